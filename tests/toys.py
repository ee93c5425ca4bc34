"""A network, a loader and batches that cost a millisecond."""
import torch
from torch import nn

from captcha_hrnet.geometry import HeatmapCodec, Letterbox
from captcha_hrnet.model import decode_outputs

HEIGHT, WIDTH = 32, 64


class Toy(nn.Module):
    "A network with every output of the real one, in a millisecond."
    def __init__(self, norm: bool, width=6):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, width, 4, stride=4), nn.BatchNorm2d(width) if norm else nn.Identity(), nn.GELU())
        self.head = nn.Conv2d(width, 6, 1)

    def forward(self, image):
        image = image.float() / 255
        gap, slider, offsets = self.head(self.body(image)).split([1, 1, 4], 1)
        return dict(gap_heatmap=gap, slider_heatmap=slider, offsets=offsets, valid=image[:, 3:, ::4, ::4] > 0)

    def decode_predictions(self, outputs, **options): return decode_outputs(outputs, HeatmapCodec(), **options)


class Loader:
    "Batches in a fixed order, from the position that the engine sets."
    def __init__(self, batches): self.batches, self.batch_sampler, self.first = batches, self, 0
    def set_position(self, epoch, step=0): self.first = step
    def __len__(self): return len(self.batches)
    def __iter__(self): return iter(self.batches[self.first:])


def batch_of(count, seed=0, first=0):
    generator = torch.Generator().manual_seed(seed)
    points = lambda *shape: torch.rand(*shape, 2, generator=generator)*torch.tensor([WIDTH, HEIGHT])
    image = torch.randint(0, 256, (count, 4, HEIGHT, WIDTH), dtype=torch.uint8, generator=generator)
    image[:, 3] = 255
    return dict(image=image, gap_coords=points(count), slider_coords=points(count), decoys=points(count, 2),
                decoy_mask=torch.rand(count, 2, generator=generator) < .5, gap_angle=torch.zeros(count), piece_size=torch.full((count, 2), 20.),
                letterbox=torch.tensor(Letterbox(WIDTH, HEIGHT, WIDTH, HEIGHT).params).expand(count, -1), index=torch.arange(first, first + count))


def joined(batches): return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
