"""An experiment, not used by the library: the exact Lite-HRNet-18 + LiteFPN in Triton kernels (NCHW, training mode), `forward(model, image)` in place of `model(image)`.

Normalisation is carried along (`Pending`) and applied by whatever reads a map; convolutions sum their statistics on the way. Of a step at batch 128, 4x256x512, bf16, the kernels read
and write some 70 GB: 27 ms at 2.6 TB/s. Seen on one H100 with depthwise kernels that loaded each tap's two bytes by themselves (67 of 122 ms): 1,043 to 1,129 img/s."""
import torch, triton
import triton.language as tl
from torch import Tensor, nn
import torch.nn.functional as F
from typing import NamedTuple


@triton.jit
def _activate(x, scale, shift, AFFINE: tl.constexpr, RELU: tl.constexpr):
    if AFFINE: x = x*scale + shift
    if RELU: x = tl.maximum(x, 0.)
    return x

@triton.jit
def _kept(slope, a, dtype: tl.constexpr):
    """The slope times the scale as memory keeps it, and the slope that this stands for. A normalisation takes the mean out of what is kept, so the sums must be of that:
    pixels of like slope share their rounding error, and a mean of it that stays outweighs what they differ by."""
    kept = (slope*a).to(dtype)
    return kept, tl.where(tl.abs(a) < 1e-30, slope, kept.to(tl.float32)*(1/a))

@triton.jit
def _block_sum(x, U: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):   # [BH, BW] -> [BH/U, BW/U]
    return tl.sum(tl.sum(tl.reshape(x, [BH//U, U, BW//U, U]), 3), 1)

@triton.jit
def _halves(x): return tl.split(tl.reshape(x, [x.shape[0], x.shape[1]//2, 2]))   # even and odd columns: no data moves where a thread holds both

@triton.jit
def _dealt(even, odd): return tl.reshape(tl.join(even, odd), [even.shape[0], 2*even.shape[1]])

@triton.jit
def _beside(x, STEP: tl.constexpr, K: tl.constexpr):
    "Each column's left (-1) or right (1) neighbour, zero beyond the border; of a thread's K columns only one comes from another thread."
    if K > 1:
        even, odd = _halves(x)
        return _dealt(_beside(odd, STEP, K//2), even) if STEP < 0 else _dealt(odd, _beside(even, STEP, K//2))
    else:
        at = tl.arange(0, x.shape[1])[None, :] + STEP
        inside = (at >= 0) & (at < x.shape[1])
        return tl.where(inside, tl.gather(x, tl.broadcast_to(tl.where(inside, at, 0), x.shape), 1), 0.)

@triton.jit
def _folded(x, K: tl.constexpr):   # sums of K columns
    if K > 1:
        even, odd = _halves(x)
        return _folded(even + odd, K//2)
    else: return x

@triton.jit
def _spread(x, K: tl.constexpr): return _spread(_dealt(x, x), K//2) if K > 1 else x   # each column K times

@triton.jit
def _triple(pointer): return (tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2))

@triton.jit
def _row(x, n, r, N, H, W, x_n, BW: tl.constexpr):
    q = tl.arange(0, BW)[None, :]
    inside = (n < N) & (r >= 0) & (r < H) & (q < W)
    return tl.load(x + n*x_n + r*W + q, mask=inside, other=0.).to(tl.float32), inside

@triton.jit
def _seen_row(x, a, b, gate, ga, gb, n, r, N, H, W, x_n, gate_n, BW: tl.constexpr, STRIDE: tl.constexpr, U: tl.constexpr, AFFINE: tl.constexpr, RELU: tl.constexpr):
    "Row r of the input as a kernel's left, middle and right column see it."
    v, inside = _row(x, n, r, N, H, W, x_n, BW)
    if AFFINE or RELU: v = tl.where(inside, _activate(v, a, b, AFFINE, RELU), 0.)
    if U: v = v*_spread(tl.sigmoid(_row(gate, n, r//U, N, H//U, W//U, gate_n, BW//U)[0]*ga + gb), U)
    if STRIDE == 1: return _beside(v, -1, 8), v, _beside(v, 1, 8)
    else:
        even, odd = _halves(v)
        return _beside(odd, -1, 4), even, odd

@triton.jit
def _depthwise_forward(x, scale, shift, gate, gate_scale, gate_shift, weight, out, stats, N, C, H, W, Ho, Wo, x_n, x_c, gate_n, rows,
                       BM: tl.constexpr, BW: tl.constexpr, STRIDE: tl.constexpr, U: tl.constexpr, AFFINE: tl.constexpr, RELU: tl.constexpr):
    "A program walks down some rows of one channel of BM pictures; a thread holds 8 neighbouring columns, so every load and store is aligned."
    chunk, c, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)*BM + tl.arange(0, BM)[:, None]
    a = tl.load(scale + c) if AFFINE else 1.
    b = tl.load(shift + c) if AFFINE else 0.
    ga = tl.load(gate_scale + c) if U else 1.
    gb = tl.load(gate_shift + c) if U else 0.
    w = (_triple(weight + c*9), _triple(weight + c*9 + 3), _triple(weight + c*9 + 6))
    x, out = x + c*x_c, out + c*Ho*Wo
    if U: gate = gate + c*(H//U)*(W//U)
    K: tl.constexpr = 8//STRIDE
    q = tl.arange(0, BW//STRIDE)[None, :]
    s, ss = tl.zeros([BM, BW//8], tl.float32), tl.zeros([BM, BW//8], tl.float32)
    first = chunk*rows
    above = _seen_row(x, a, b, gate, ga, gb, n, first*STRIDE - 1, N, H, W, x_n, gate_n, BW, STRIDE, U, AFFINE, RELU)
    here = _seen_row(x, a, b, gate, ga, gb, n, first*STRIDE, N, H, W, x_n, gate_n, BW, STRIDE, U, AFFINE, RELU)
    for r in range(first, tl.minimum(first + rows, Ho)):
        below = _seen_row(x, a, b, gate, ga, gb, n, r*STRIDE + 1, N, H, W, x_n, gate_n, BW, STRIDE, U, AFFINE, RELU)
        y = tl.zeros([BM, BW//STRIDE], tl.float32)
        for kx in tl.static_range(3): y += above[kx]*w[0][kx] + here[kx]*w[1][kx] + below[kx]*w[2][kx]
        y = y.to(out.dtype.element_ty)
        tl.store(out + n*C*Ho*Wo + r*Wo + q, y, mask=(n < N) & (q < Wo))
        y = tl.where(q < Wo, y.to(tl.float32), 0.)
        s += _folded(y, K)
        ss += _folded(y*y, K)
        if STRIDE == 1: above, here = here, below
        else: above, here = below, _seen_row(x, a, b, gate, ga, gb, n, 2*r + 2, N, H, W, x_n, gate_n, BW, STRIDE, U, AFFINE, RELU)
    P, at = N*tl.num_programs(0), n*tl.num_programs(0) + chunk
    tl.store(stats + c*P + at, tl.sum(s, 1, keep_dims=True), mask=n < N)
    tl.store(stats + (C + c)*P + at, tl.sum(ss, 1, keep_dims=True), mask=n < N)

@triton.jit
def _slope_row(g, y, gs, gss, n, r, N, H, W, y_n, BW: tl.constexpr, STRIDE: tl.constexpr):
    "Row r of the gradient of a convolution's output, its statistics' share included, as the input's columns see it through a kernel's left, middle and right column."
    d, inside = _row(g, n, r, N, H, W, y_n, BW)
    d = tl.where(inside, d + gs + gss*_row(y, n, r, N, H, W, y_n, BW)[0], 0.)
    right = _beside(d, 1, 8//STRIDE)
    if STRIDE == 1: return right, d, _beside(d, -1, 8)
    else: return right, d, d

@triton.jit
def _depthwise_backward(g, y, gstats, x, scale, shift, gate, gate_scale, gate_shift, weight, gx, ggate, sums,
                        N, C, H, W, Ho, Wo, x_n, x_c, gate_n, rows, gstats_h, gstats_c, gstats_n,
                        BM: tl.constexpr, BW: tl.constexpr, STRIDE: tl.constexpr, U: tl.constexpr, AFFINE: tl.constexpr, RELU: tl.constexpr):
    "As the forward; an output's row stands for STRIDE rows of the input. `sums`: a row for each gradient of weight, scale, shift, the gate's scale and shift."
    chunk, c, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)*BM + tl.arange(0, BM)[:, None]
    a = tl.load(scale + c) if AFFINE else 1.
    b = tl.load(shift + c) if AFFINE else 0.
    gs = tl.load(gstats + c*gstats_c + n*gstats_n, mask=n < N, other=0.)
    gss = 2*tl.load(gstats + gstats_h + c*gstats_c + n*gstats_n, mask=n < N, other=0.)
    w = (_triple(weight + c*9), _triple(weight + c*9 + 3), _triple(weight + c*9 + 6))
    q = tl.arange(0, BW)[None, :]
    x, gx, g, y, y_n = x + c*x_c, gx + c*H*W, g + c*Ho*Wo, y + c*Ho*Wo, C*Ho*Wo
    zero = tl.zeros([BM, BW//8], tl.float32)
    gw, gscale, gshift = (zero,)*9, zero, zero
    if U:
        ga, gb, narrow = tl.load(gate_scale + c), tl.load(gate_shift + c), tl.arange(0, BW//U)[None, :]
        gate, ggate = gate + c*(H//U)*(W//U), ggate + c*(H//U)*(W//U)
        blocks = tl.zeros([BM, BW//U], tl.float32)
        gate_gscale, gate_gshift = zero, zero
    first = chunk*rows
    here = _slope_row(g, y, gs, gss, n, first, N, Ho, Wo, y_n, BW//STRIDE, STRIDE)
    above = _slope_row(g, y, gs, gss, n, first - 1, N, Ho, Wo, y_n, BW//STRIDE, STRIDE) if STRIDE == 1 else here
    for r in range(first, tl.minimum(first + rows, Ho)):
        below = _slope_row(g, y, gs, gss, n, r + 1, N, Ho, Wo, y_n, BW//STRIDE, STRIDE)
        lines = (above, here, below)
        inputs = (_row(x, n, r*STRIDE, N, H, W, x_n, BW),) + ((_row(x, n, r*STRIDE + 1, N, H, W, x_n, BW),) if STRIDE == 2 else ())
        for s in tl.static_range(STRIDE):
            at = r*STRIDE + s
            raw, inside = inputs[s]
            value = tl.where(inside, _activate(raw, a, b, AFFINE, RELU), 0.)
            gated = value
            if U:
                closed = _row(gate, n, at//U, N, H//U, W//U, gate_n, BW//U)[0]
                door = tl.sigmoid(closed*ga + gb)
                wide = _spread(door, U)
                gated = value*wide
            if STRIDE == 1: seen = (gated, gated, gated)
            else:
                even, odd = _halves(gated)
                seen = (odd, even, odd)
            taps, total, other = (), tl.zeros([BM, BW//STRIDE], tl.float32), tl.zeros([BM, BW//STRIDE], tl.float32)
            for ky in tl.static_range(3):
                if (s + 1 - ky) % STRIDE == 0:
                    line = lines[(s + 1 - ky)//STRIDE + 1]
                    for kx in tl.static_range(3): taps = taps + (gw[ky*3 + kx] + _folded(line[kx]*seen[kx], 8//STRIDE),)
                    total += line[1]*w[ky][1]
                    if STRIDE == 1: total += line[0]*w[ky][0] + line[2]*w[ky][2]
                    else: other += line[0]*w[ky][0] + line[2]*w[ky][2]
                else: taps = taps + gw[ky*3:ky*3 + 3]
            gw = taps
            if STRIDE == 2: total = _dealt(total, other)
            if U:
                blocks = tl.where(at % U == 0, 0., blocks) + _folded(total*value, U)
                last = at % U == U - 1
                kept, slope = _kept(tl.where(last, blocks*door*(1 - door), 0.), ga, ggate.dtype.element_ty)
                gate_gscale += _folded(slope*closed, 8//U)
                gate_gshift += _folded(slope, 8//U)
                tl.store(ggate + n*C*(H//U)*(W//U) + at//U*(W//U) + narrow, kept, mask=(n < N) & (narrow < W//U) & last)
                total = total*wide
            if AFFINE or RELU: total = tl.where(value > 0 if RELU else inside, total, 0.)
            if AFFINE:
                total, slope = _kept(total, a, gx.dtype.element_ty)
                gscale += _folded(slope*raw, 8)
                gshift += _folded(slope, 8)
            tl.store(gx + n*C*H*W + at*W + q, total.to(gx.dtype.element_ty), mask=inside)
        above, here = here, below
    P, at = tl.num_programs(0)*tl.num_programs(2), tl.program_id(2)*tl.num_programs(0) + chunk
    for i in tl.static_range(9): tl.store(sums + (c*9 + i)*P + at, tl.sum(gw[i]))
    if AFFINE:
        tl.store(sums + (C*9 + c)*P + at, tl.sum(gscale))
        tl.store(sums + (C*10 + c)*P + at, tl.sum(gshift))
    if U:
        tl.store(sums + (C*(11 if AFFINE else 9) + c)*P + at, tl.sum(gate_gscale))
        tl.store(sums + (C*(12 if AFFINE else 10) + c)*P + at, tl.sum(gate_gshift))

@triton.jit
def _pointwise_forward(x, scale, shift, weight, out, stats, Ci, Co, HW, x_n, tiles,
                       BCI: tl.constexpr, BCO: tl.constexpr, BP: tl.constexpr, AFFINE: tl.constexpr, RELU: tl.constexpr, EXACT: tl.constexpr):
    tile = tl.program_id(0)
    n, p = tile // tiles, (tile % tiles)*BP + tl.arange(0, BP)
    i, o = tl.arange(0, BCI), tl.program_id(1)*BCO + tl.arange(0, BCO)
    inside = (i < Ci)[:, None] & (p < HW)[None, :]
    v = tl.load(x + n*x_n + i[:, None]*HW + p[None, :], mask=inside, other=0.)
    if AFFINE or RELU:
        a = tl.load(scale + i, mask=i < Ci, other=0.)[:, None] if AFFINE else 1.
        b = tl.load(shift + i, mask=i < Ci, other=0.)[:, None] if AFFINE else 0.
        v = tl.where(inside, _activate(v.to(tl.float32), a, b, AFFINE, RELU), 0.)
    w = tl.load(weight + o[:, None]*Ci + i[None, :], mask=(o < Co)[:, None] & (i < Ci)[None, :], other=0.)
    if EXACT: y = tl.dot(w, v.to(tl.float32), input_precision='ieee')
    else: y = tl.dot(w.to(x.dtype.element_ty), v.to(x.dtype.element_ty))
    y = y.to(out.dtype.element_ty)
    here = (o < Co)[:, None] & (p < HW)[None, :]
    tl.store(out + (n*Co + o[:, None])*HW + p[None, :], y, mask=here)
    y = tl.where(here, y.to(tl.float32), 0.)
    P = tl.num_programs(0)
    tl.store(stats + o*P + tile, tl.sum(y, 1), mask=o < Co)
    tl.store(stats + (Co + o)*P + tile, tl.sum(y*y, 1), mask=o < Co)

@triton.jit
def _pointwise_backward(g, y, gstats, x, scale, shift, weight, gx, sums, Ci, Co, HW, x_n, tiles, all_tiles,
                        BCI: tl.constexpr, BCO: tl.constexpr, BP: tl.constexpr, AFFINE: tl.constexpr, RELU: tl.constexpr, EXACT: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    i, o = tl.arange(0, BCI), tl.arange(0, BCO)
    kind = tl.float32 if EXACT else x.dtype.element_ty
    wt = tl.load(weight + o[None, :]*Ci + i[:, None], mask=(o < Co)[None, :] & (i < Ci)[:, None], other=0.).to(kind)   # [Ci, Co]
    a = tl.load(scale + i, mask=i < Ci, other=0.)[:, None] if AFFINE else 1.
    b = tl.load(shift + i, mask=i < Ci, other=0.)[:, None] if AFFINE else 0.
    gs = tl.load(gstats + o, mask=o < Co, other=0.)[:, None]
    gss = 2*tl.load(gstats + Co + o, mask=o < Co, other=0.)[:, None]
    gw = tl.zeros([BCO, BCI], tl.float32)
    gscale, gshift = tl.zeros([BCI], tl.float32), tl.zeros([BCI], tl.float32)
    for tile in range(program, all_tiles, programs):
        n, p = tile // tiles, (tile % tiles)*BP + tl.arange(0, BP)
        here = (o < Co)[:, None] & (p < HW)[None, :]
        at_y = (n*Co + o[:, None])*HW + p[None, :]
        d = tl.load(g + at_y, mask=here, other=0.).to(tl.float32) + gs + gss*tl.load(y + at_y, mask=here, other=0.).to(tl.float32)
        d = tl.where(here, d, 0.).to(kind)
        inside = (i < Ci)[:, None] & (p < HW)[None, :]
        raw = tl.load(x + n*x_n + i[:, None]*HW + p[None, :], mask=inside, other=0.).to(tl.float32)
        value = tl.where(inside, _activate(raw, a, b, AFFINE, RELU), 0.)
        gv = tl.dot(wt, d, input_precision='ieee' if EXACT else 'tf32')
        gw += tl.dot(d, tl.trans(value.to(kind)), input_precision='ieee' if EXACT else 'tf32')
        if RELU: gv = tl.where(value > 0, gv, 0.)
        if AFFINE:
            gv, slope = _kept(gv, a, gx.dtype.element_ty)
            gscale += tl.sum(slope*raw, 1)
            gshift += tl.sum(slope, 1)
        tl.store(gx + (n*Ci + i[:, None])*HW + p[None, :], gv.to(gx.dtype.element_ty), mask=inside)
    sums = sums + program*(Co + (2 if AFFINE else 0))*Ci
    tl.store(sums + o[:, None]*Ci + i[None, :], gw, mask=(o < Co)[:, None] & (i < Ci)[None, :])
    if AFFINE:
        tl.store(sums + Co*Ci + i, gscale, mask=i < Ci)
        tl.store(sums + (Co + 1)*Ci + i, gshift, mask=i < Ci)

@triton.jit
def _patches(x, n, p, t, Ci, H, W, Ho, Wo, STRIDE: tl.constexpr):
    "What taps t of a dense 3×3 convolution see at pixels p of its output."
    r, q = p//Wo*STRIDE + t % 9//3 - 1, p % Wo*STRIDE + t % 3 - 1
    return tl.load(x + (n*Ci + t//9)*H*W + r*W + q, mask=(t < 9*Ci) & (p < Ho*Wo) & (r >= 0) & (r < H) & (q >= 0) & (q < W), other=0.)

@triton.jit
def _dense_forward(x, weight, out, stats, Ci, Co, H, W, Ho, Wo, tiles, all_tiles, STRIDE: tl.constexpr, BT: tl.constexpr, BCO: tl.constexpr, BP: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    t, o, pixels = tl.arange(0, BT), tl.arange(0, BCO), tl.arange(0, BP)
    w = tl.load(weight + o[:, None]*9*Ci + t[None, :], mask=(o < Co)[:, None] & (t < 9*Ci)[None, :], other=0.).to(x.dtype.element_ty)
    s, ss = tl.zeros([BCO], tl.float32), tl.zeros([BCO], tl.float32)
    for tile in range(program, all_tiles, programs):
        n, p = tile // tiles, (tile % tiles)*BP + pixels[None, :]
        y = tl.dot(w, _patches(x, n, p, t[:, None], Ci, H, W, Ho, Wo, STRIDE), input_precision='ieee').to(out.dtype.element_ty)
        tl.store(out + (n*Co + o[:, None])*Ho*Wo + p, y, mask=(o < Co)[:, None] & (p < Ho*Wo))
        y = y.to(tl.float32)
        s += tl.sum(y, 1)
        ss += tl.sum(y*y, 1)
    tl.store(stats + o*programs + program, s, mask=o < Co)
    tl.store(stats + (Co + o)*programs + program, ss, mask=o < Co)

@triton.jit
def _dense_backward(g, y, gstats, x, gweight, Ci, Co, H, W, Ho, Wo, tiles, all_tiles, STRIDE: tl.constexpr, BT: tl.constexpr, BCO: tl.constexpr, BP: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    t, o, pixels = tl.arange(0, BT), tl.arange(0, BCO), tl.arange(0, BP)
    gs = tl.load(gstats + o, mask=o < Co, other=0.)[:, None]
    gss = 2*tl.load(gstats + Co + o, mask=o < Co, other=0.)[:, None]
    gw = tl.zeros([BCO, BT], tl.float32)
    for tile in range(program, all_tiles, programs):
        n, p = tile // tiles, (tile % tiles)*BP + pixels[None, :]
        at, here = (n*Co + o[:, None])*Ho*Wo + p, (o < Co)[:, None] & (p < Ho*Wo)
        d = tl.load(g + at, mask=here, other=0.).to(tl.float32) + gs + gss*tl.load(y + at, mask=here, other=0.).to(tl.float32)
        d = tl.where(here, d, 0.).to(x.dtype.element_ty)
        gw += tl.dot(d, tl.trans(_patches(x, n, p, t[:, None], Ci, H, W, Ho, Wo, STRIDE)), input_precision='ieee')
    tl.store(gweight + (program*Co + o[:, None])*9*Ci + t[None, :], gw, mask=(o < Co)[:, None] & (t < 9*Ci)[None, :])

@triton.jit
def _normalise_forward(stats, gamma, beta, mean_run, var_run, scale, shift, saved, C, P, count, momentum, eps, B: tl.constexpr):
    c = tl.program_id(0)
    s, ss = tl.zeros([B], tl.float32), tl.zeros([B], tl.float32)
    for start in range(0, P, B):
        at = start + tl.arange(0, B)
        s += tl.load(stats + c*P + at, mask=at < P, other=0.)
        ss += tl.load(stats + (C + c)*P + at, mask=at < P, other=0.)
    mean = tl.sum(s)/count
    var = tl.maximum(tl.sum(ss)/count - mean*mean, 0.)
    rstd = 1/tl.sqrt(var + eps)
    a = tl.load(gamma + c)*rstd
    tl.store(scale + c, a)
    tl.store(shift + c, tl.load(beta + c) - mean*a)
    tl.store(saved + c, mean)
    tl.store(saved + C + c, rstd)
    old = tl.load(mean_run + c)
    tl.store(mean_run + c, old + momentum*(mean - old))
    old = tl.load(var_run + c)
    tl.store(var_run + c, old + momentum*(var*count/(count - 1) - old))

@triton.jit
def _normalise_backward(gscale, gshift, gamma, saved, gstats, ggamma, gbeta, C, count, B: tl.constexpr):
    c = tl.arange(0, B)
    here = c < C
    ga, gb = tl.load(gscale + c, mask=here, other=0.), tl.load(gshift + c, mask=here, other=0.)
    gamma, mean, rstd = tl.load(gamma + c, mask=here, other=0.), tl.load(saved + c, mask=here, other=0.), tl.load(saved + C + c, mask=here, other=0.)
    centred = ga - mean*gb                      # d loss / d (gamma rstd)
    tl.store(ggamma + c, rstd*centred, mask=here)
    tl.store(gbeta + c, gb, mask=here)
    gvar = -0.5*gamma*centred*rstd*rstd*rstd
    tl.store(gstats + c, (-gamma*rstd*gb - 2*mean*gvar)/count, mask=here)
    tl.store(gstats + C + c, gvar/count, mask=here)

@triton.jit
def _pool(x, out, C, H, W, x_n, x_c, out_n, first, BH: tl.constexpr, BW: tl.constexpr, U: tl.constexpr):
    plane, chunk = tl.program_id(0), tl.program_id(1)
    n, c = plane // C, plane % C
    rows, cols = chunk*BH + tl.arange(0, BH)[:, None], tl.arange(0, BW)[None, :]
    v = tl.load(x + n*x_n + c*x_c + rows*W + cols, mask=(rows < H) & (cols < W), other=0.).to(tl.float32)
    h, w = chunk*(BH//U) + tl.arange(0, BH//U)[:, None], tl.arange(0, BW//U)[None, :]
    tl.store(out + n*out_n + ((first + c)*(H//U) + h)*(W//U) + w, (_block_sum(v, U, BH, BW)/(U*U)).to(out.dtype.element_ty), mask=(h < H//U) & (w < W//U))

@triton.jit
def _entry_backward(left, right, pooled, gx, C, H, W, left_n, left_c, pooled_n, first, BH: tl.constexpr, BW: tl.constexpr, U: tl.constexpr):
    "Gradient of a map from those of its left half, its right half and the right half's pooled map. C: channels of a half."
    plane, rows = tl.program_id(0), tl.program_id(1)*BH + tl.arange(0, BH)[:, None]
    n, c = plane // (2*C), plane % (2*C)
    cols, q = tl.arange(0, BW)[None, :], tl.arange(0, BW//U)[None, :]
    p, here = rows*W + cols, (rows < H) & (cols < W)
    if c < C: v = tl.load(left + n*left_n + c*left_c + p, mask=here, other=0.).to(tl.float32)
    else:
        v = tl.load(right + (n*C + c - C)*H*W + p, mask=here, other=0.).to(tl.float32)
        share = tl.load(pooled + n*pooled_n + ((first + c - C)*(H//U) + rows//U)*(W//U) + q, mask=(rows < H) & (q < W//U), other=0.).to(tl.float32)
        v += _spread(share/(U*U), U)
    tl.store(gx + plane*H*W + p, v.to(gx.dtype.element_ty), mask=here)

@triton.jit
def _assemble_forward(left, y, a, b, out, C, HW, left_n, B: tl.constexpr):   # C: channels of a half
    plane, p = tl.program_id(0), tl.program_id(1)*B + tl.arange(0, B)
    n, c = plane // C, plane % C
    here = p < HW
    tl.store(out + (2*plane)*HW + p, tl.load(left + n*left_n + c*HW + p, mask=here), mask=here)
    v = tl.load(y + plane*HW + p, mask=here, other=0.).to(tl.float32)*tl.load(a + plane) + tl.load(b + plane)
    tl.store(out + (2*plane + 1)*HW + p, v.to(out.dtype.element_ty), mask=here)

@triton.jit
def _assemble_backward(g, y, a, gy, ga, gb, HW, B: tl.constexpr):
    plane = tl.program_id(0)
    p = tl.arange(0, B)
    scale = tl.load(a + plane)
    sa, sb = tl.zeros([B], tl.float32), tl.zeros([B], tl.float32)
    for start in range(0, HW, B):
        here = start + p < HW
        kept, d = _kept(tl.load(g + (2*plane + 1)*HW + start + p, mask=here, other=0.).to(tl.float32), scale, gy.dtype.element_ty)
        sa += d*tl.load(y + plane*HW + start + p, mask=here, other=0.).to(tl.float32)
        sb += d
        tl.store(gy + plane*HW + start + p, kept, mask=here)
    tl.store(ga + plane, tl.sum(sa))
    tl.store(gb + plane, tl.sum(sb))

@triton.jit
def _term(x, scale, shift, n, c, C, H, W, rows, BW: tl.constexpr, U: tl.constexpr, AFFINE: tl.constexpr, RELU: tl.constexpr):
    q = tl.arange(0, BW//U)[None, :]
    v = tl.load(x + ((n*C + c)*(H//U) + rows//U)*(W//U) + q, mask=(rows < H) & (q < W//U), other=0.).to(tl.float32)
    a = tl.load(scale + c) if AFFINE else 1.
    b = tl.load(shift + c) if AFFINE else 0.
    return _spread(_activate(v, a, b, AFFINE, RELU), U)

@triton.jit
def _term_backward(d, x, scale, shift, gx, gsums, n, c, C, H, W, P, at, chunk, BH: tl.constexpr, BW: tl.constexpr,
                   U: tl.constexpr, AFFINE: tl.constexpr, RELU: tl.constexpr):
    if U > 1: d = _block_sum(d, U, BH, BW)
    rows, cols = chunk*(BH//U) + tl.arange(0, BH//U)[:, None], tl.arange(0, BW//U)[None, :]
    here = (rows < H//U) & (cols < W//U)
    place = ((n*C + c)*(H//U) + rows)*(W//U) + cols
    if AFFINE:
        a, b = tl.load(scale + c), tl.load(shift + c)
        raw = tl.load(x + place, mask=here, other=0.).to(tl.float32)
        if RELU: d = tl.where(raw*a + b > 0, d, 0.)
        kept, d = _kept(d, a, gx.dtype.element_ty)
        tl.store(gsums + c*P + at, tl.sum(d*raw))
        tl.store(gsums + (C + c)*P + at, tl.sum(d))
        tl.store(gx + place, kept, mask=here)
    else: tl.store(gx + place, d.to(gx.dtype.element_ty), mask=here)

@triton.jit
def _sum_forward(x0, a0, b0, x1, a1, b1, x2, a2, b2, x3, a3, b3, total, out, C, H, W, BH: tl.constexpr, BW: tl.constexpr,
                 T: tl.constexpr, U0: tl.constexpr, U1: tl.constexpr, U2: tl.constexpr, U3: tl.constexpr,
                 A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, A3: tl.constexpr, RELU_IN: tl.constexpr, TWICE: tl.constexpr,
                 TOTAL: tl.constexpr, RELU: tl.constexpr):
    plane, chunk = tl.program_id(0), tl.program_id(1)
    n, c = plane // C, plane % C
    rows, cols = chunk*BH + tl.arange(0, BH)[:, None], tl.arange(0, BW)[None, :]
    here = (rows < H) & (cols < W)
    v = _term(x0, a0, b0, n, c, C, H, W, rows, BW, U0, A0, RELU_IN)
    if TWICE: v = 2*v
    if T > 1: v += _term(x1, a1, b1, n, c, C, H, W, rows, BW, U1, A1, RELU_IN)
    if T > 2: v += _term(x2, a2, b2, n, c, C, H, W, rows, BW, U2, A2, RELU_IN)
    if T > 3: v += _term(x3, a3, b3, n, c, C, H, W, rows, BW, U3, A3, RELU_IN)
    if TOTAL: tl.store(total + plane*H*W + rows*W + cols, v.to(out.dtype.element_ty), mask=here)
    if RELU: v = tl.maximum(v, 0.)
    tl.store(out + plane*H*W + rows*W + cols, v.to(out.dtype.element_ty), mask=here)

@triton.jit
def _sum_backward(g, gtotal, out, x0, a0, b0, g0, s0, x1, a1, b1, g1, s1, x2, a2, b2, g2, s2, x3, a3, b3, g3, s3, C, H, W, chunks,
                  BH: tl.constexpr, BW: tl.constexpr, T: tl.constexpr, U0: tl.constexpr, U1: tl.constexpr, U2: tl.constexpr, U3: tl.constexpr,
                  A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, A3: tl.constexpr, RELU_IN: tl.constexpr, TWICE: tl.constexpr,
                  TOTAL: tl.constexpr, RELU: tl.constexpr):
    plane, chunk = tl.program_id(0), tl.program_id(1)
    n, c = plane // C, plane % C
    rows, cols = chunk*BH + tl.arange(0, BH)[:, None], tl.arange(0, BW)[None, :]
    here = (rows < H) & (cols < W)
    place = plane*H*W + rows*W + cols
    d = tl.load(g + place, mask=here, other=0.).to(tl.float32)
    if RELU: d = tl.where(tl.load(out + place, mask=here, other=0.).to(tl.float32) > 0, d, 0.)
    if TOTAL: d += tl.load(gtotal + place, mask=here, other=0.).to(tl.float32)
    P, at = tl.num_programs(0)//C*chunks, n*chunks + chunk
    first = 2*d if TWICE else d
    _term_backward(first, x0, a0, b0, g0, s0, n, c, C, H, W, P, at, chunk, BH, BW, U0, A0, RELU_IN)
    if T > 1: _term_backward(d, x1, a1, b1, g1, s1, n, c, C, H, W, P, at, chunk, BH, BW, U1, A1, RELU_IN)
    if T > 2: _term_backward(d, x2, a2, b2, g2, s2, n, c, C, H, W, P, at, chunk, BH, BW, U2, A2, RELU_IN)
    if T > 3: _term_backward(d, x3, a3, b3, g3, s3, n, c, C, H, W, P, at, chunk, BH, BW, U3, A3, RELU_IN)

@triton.jit
def _blend_forward(fine, coarse, share, out, H, W, BH: tl.constexpr, BW: tl.constexpr):   # H, W: of the fine map
    plane, chunk = tl.program_id(0), tl.program_id(1)
    rows, cols = chunk*BH + tl.arange(0, BH)[:, None], tl.arange(0, BW)[None, :]
    here = (rows < H) & (cols < W)
    r, q, h, w = rows//2, cols//2, H//2, W//2
    r2, q2 = r + 2*(rows % 2) - 1, q + 2*(cols % 2) - 1
    r2, q2 = tl.minimum(tl.maximum(r2, 0), h - 1), tl.minimum(tl.maximum(q2, 0), w - 1)
    base = coarse + plane*h*w
    up = 0.5625*tl.load(base + r*w + q, mask=here, other=0.).to(tl.float32) + 0.1875*tl.load(base + r*w + q2, mask=here, other=0.).to(tl.float32) \
        + 0.1875*tl.load(base + r2*w + q, mask=here, other=0.).to(tl.float32) + 0.0625*tl.load(base + r2*w + q2, mask=here, other=0.).to(tl.float32)
    v = tl.load(share)*tl.load(fine + plane*H*W + rows*W + cols, mask=here, other=0.).to(tl.float32) + tl.load(share + 1)*up
    tl.store(out + plane*H*W + rows*W + cols, v.to(out.dtype.element_ty), mask=here)

@triton.jit
def _blend_backward(g, fine, coarse, share, gfine, gcoarse, gshare, H, W, chunks, BH: tl.constexpr, BW: tl.constexpr):   # H, W: of the coarse map; a tile of it
    plane, chunk = tl.program_id(0), tl.program_id(1)
    rows, cols = chunk*BH + tl.arange(0, BH)[:, None], tl.arange(0, BW)[None, :]
    here = (rows < H) & (cols < W)
    w0, w1 = tl.load(share), tl.load(share + 1)
    total, s0 = tl.zeros([BH, BW], tl.float32), 0.
    for dy in tl.static_range(4):
        for dx in tl.static_range(4):
            r, q = 2*rows + (dy - 1), 2*cols + (dx - 1)
            inside = here & (r >= 0) & (r < 2*H) & (q >= 0) & (q < 2*W)
            at = plane*4*H*W + r*2*W + q
            d = tl.load(g + at, mask=inside, other=0.).to(tl.float32)
            wy = tl.where((r == 0) | (r == 2*H - 1), 1., 0.75 if (dy == 1 or dy == 2) else 0.25)   # the border's own value stands in for what lies beyond
            wx = tl.where((q == 0) | (q == 2*W - 1), 1., 0.75 if (dx == 1 or dx == 2) else 0.25)
            total += d*wy*wx
            if (dy == 1 or dy == 2) and (dx == 1 or dx == 2):
                s0 += tl.sum(d*tl.load(fine + at, mask=inside, other=0.).to(tl.float32))
                tl.store(gfine + at, (d*w0).to(gfine.dtype.element_ty), mask=inside)
    top = tl.load(coarse + plane*H*W + rows*W + cols, mask=here, other=0.).to(tl.float32)
    tl.store(gcoarse + plane*H*W + rows*W + cols, (total*w1).to(gcoarse.dtype.element_ty), mask=here)
    P, at = tl.num_programs(0)*chunks, plane*chunks + chunk
    tl.store(gshare + at, s0)
    tl.store(gshare + P + at, tl.sum(total*top))

@triton.jit
def _matrix(weight, R, C, BR: tl.constexpr, BC: tl.constexpr):
    r, c = tl.arange(0, BR)[:, None], tl.arange(0, BC)[None, :]
    return tl.load(weight + r*C + c, mask=(r < R) & (c < C), other=0.)

@triton.jit
def _excite_forward(stats, scale, shift, w1, b1, w2, b2, a, b, saved, N, C, R, parts, pixels, BC: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr):
    "One picture's spatial weighting, folded into the normalisation. `saved` [N, 3 C + R]: means as convolved, means, weights, hidden units."
    n, c, r, p = tl.program_id(0), tl.arange(0, BC), tl.arange(0, BR), tl.arange(0, BP)[None, :]
    here, saved = c < C, saved + n*(3*C + R)
    mean = tl.sum(tl.load(stats + (c[:, None]*N + n)*parts + p, mask=here[:, None] & (p < parts), other=0.), 1)/pixels
    scale, shift = tl.load(scale + c, mask=here, other=0.), tl.load(shift + c, mask=here, other=0.)
    means = mean*scale + shift
    hidden = tl.maximum(tl.sum(_matrix(w1, R, C, BR, BC)*means[None, :], 1) + tl.load(b1 + r, mask=r < R, other=0.), 0.)
    weight = tl.sigmoid(tl.sum(_matrix(w2, C, R, BC, BR)*hidden[None, :], 1) + tl.load(b2 + c, mask=here, other=0.))
    tl.store(a + n*C + c, weight*scale, mask=here)
    tl.store(b + n*C + c, weight*shift, mask=here)
    tl.store(saved + c, mean, mask=here)
    tl.store(saved + C + c, means, mask=here)
    tl.store(saved + 2*C + c, weight, mask=here)
    tl.store(saved + 3*C + r, hidden, mask=r < R)

@triton.jit
def _excite_backward(ga, gb, scale, shift, w1, w2, saved, gstats, slopes, N, C, R, pixels, BC: tl.constexpr, BR: tl.constexpr):
    "`slopes` [N, 3 C + R]: of scale, shift and the two layers' sums."
    n, c, r = tl.program_id(0), tl.arange(0, BC), tl.arange(0, BR)
    here, saved, slopes = c < C, saved + n*(3*C + R), slopes + n*(3*C + R)
    scale, shift = tl.load(scale + c, mask=here, other=0.), tl.load(shift + c, mask=here, other=0.)
    ga, gb = tl.load(ga + n*C + c, mask=here, other=0.), tl.load(gb + n*C + c, mask=here, other=0.)
    mean, weight, hidden = tl.load(saved + c, mask=here, other=0.), tl.load(saved + 2*C + c, mask=here, other=0.), tl.load(saved + 3*C + r, mask=r < R, other=0.)
    second = (ga*scale + gb*shift)*weight*(1 - weight)
    first = tl.where(hidden > 0, tl.sum(_matrix(w2, C, R, BC, BR)*second[:, None], 0), 0.)
    gmean = tl.sum(_matrix(w1, R, C, BR, BC)*first[:, None], 0)
    tl.store(gstats + c*N + n, gmean*scale/pixels, mask=here)
    tl.store(gstats + (C + c)*N + n, gmean*0., mask=here)
    tl.store(slopes + c, ga*weight + gmean*mean, mask=here)
    tl.store(slopes + C + c, gb*weight + gmean, mask=here)
    tl.store(slopes + 2*C + c, second, mask=here)
    tl.store(slopes + 3*C + r, first, mask=r < R)

@triton.jit
def _plane_sums(x, stats, C, HW, N, B: tl.constexpr):
    plane = tl.program_id(0)
    n, c = plane // C, plane % C
    s, ss = tl.zeros([B], tl.float32), tl.zeros([B], tl.float32)
    for start in range(0, HW, B):
        p = start + tl.arange(0, B)
        v = tl.load(x + plane*HW + p, mask=p < HW, other=0.).to(tl.float32)
        s += v
        ss += v*v
    tl.store(stats + c*N + n, tl.sum(s))
    tl.store(stats + (C + c)*N + n, tl.sum(ss))

@triton.jit
def _plane_sums_backward(g, x, gstats, out, C, HW, N, B: tl.constexpr):
    plane, p = tl.program_id(0), tl.program_id(1)*B + tl.arange(0, B)
    n, c = plane // C, plane % C
    v = tl.load(g + plane*HW + p, mask=p < HW, other=0.).to(tl.float32) + tl.load(gstats + c*N + n) \
        + 2*tl.load(gstats + (C + c)*N + n)*tl.load(x + plane*HW + p, mask=p < HW, other=0.).to(tl.float32)
    tl.store(out + plane*HW + p, v.to(out.dtype.element_ty), mask=p < HW)


MOST, FORWARD_PIXELS, BACKWARD_PIXELS, SMS = 4096, 128, 64, 132

def _tile(height, width, most):   # rows and columns of a tile that holds whole rows and blocks of 8 rows
    columns = triton.next_power_of_2(width)
    return max(8, min(triton.next_power_of_2(height), most//columns)), columns

def _tiles(tensor_or_size, most=None):
    most = most or MOST
    height, width = tensor_or_size[-2:]
    bh, bw = _tile(height, width, most)
    return triton.cdiv(height, bh), dict(BH=bh, BW=bw, num_warps=4 if bh*bw <= 2048 else 8)

def new(like, *shape, **kw): return torch.empty(shape, device=like.device, dtype=kw.get('dtype', like.dtype))

class Depthwise(torch.autograd.Function):
    "The convolved map and the sums [2, C, N, parts] of its values and of their squares, which only ever add up over the parts."
    @staticmethod
    def forward(ctx, x, scale, shift, gate, gate_scale, gate_shift, weight, relu, stride):
        N, C, H, W = x.shape
        Ho, Wo, BW = (H - 1)//stride + 1, (W - 1)//stride + 1, max(16, triton.next_power_of_2(W))
        BM, rows = max(1, 1024//BW), 32   # pictures and rows of the output of a program: 128 threads of 8 columns; fewer rows where that makes too few programs
        groups = triton.cdiv(N, BM)
        while rows > 8 and C*groups*triton.cdiv(Ho, rows) < 8*SMS: rows //= 2
        grid, out = (triton.cdiv(Ho, rows), C, groups), new(x, N, C, Ho, Wo)
        stats = new(x, 2, C, N, grid[0], dtype=torch.float32)
        ctx.options = dict(BM=BM, BW=BW, STRIDE=stride, U=0 if gate is None else W//gate.shape[-1], AFFINE=scale is not None, RELU=relu)
        ctx.grid, ctx.sizes = grid, (N, C, H, W, Ho, Wo, x.stride(0), x.stride(1), 0 if gate is None else gate.stride(0), rows)
        _depthwise_forward[grid](x, scale, shift, gate, gate_scale, gate_shift, weight, out, stats, *ctx.sizes, **ctx.options)
        ctx.save_for_backward(x, scale, shift, gate, gate_scale, gate_shift, weight, out)
        return out, stats

    @staticmethod
    def backward(ctx, g, gstats):
        x, *affine, weight, out = ctx.saved_tensors   # affine: scale, shift, gate, gate_scale, gate_shift
        gx, ggate, C = new(x, *x.shape), None if affine[2] is None else new(x, *affine[2].shape), x.shape[1]
        rows = [9*C] + [0 if t is None else C for t in (affine[0], affine[1], affine[3], affine[4])]
        sums = new(x, sum(rows), ctx.grid[0]*ctx.grid[2], dtype=torch.float32)
        _depthwise_backward[ctx.grid](g.contiguous(), out, gstats, x, *affine, weight, gx, ggate, sums, *ctx.sizes, *gstats.stride()[:3], **ctx.options)
        gweight, *slopes = [t if len(t) else None for t in sums.sum(-1).split(rows)]
        return gx, *slopes[:2], ggate, *slopes[2:], gweight.view(weight.shape), None, None


def _padded(channels): return max(16, triton.next_power_of_2(channels))

class Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, shift, weight, relu, exact):
        (N, Ci, H, W), Co = x.shape, weight.shape[0]
        BCI, BCO = _padded(Ci), _padded(Co)
        BP = 32 if BCI == 512 else 64 if BCI*BCO >= 128*128 else FORWARD_PIXELS
        tiles = triton.cdiv(H*W, BP)
        out, stats = new(x, N, Co, H, W, dtype=torch.float32 if exact else x.dtype), new(x, 2, Co, N*tiles, dtype=torch.float32)
        options = dict(BCI=BCI, AFFINE=scale is not None, RELU=relu, EXACT=exact or x.dtype == torch.float32)
        BC = min(BCO, 64)
        _pointwise_forward[(N*tiles, triton.cdiv(Co, BC))](x, scale, shift, weight, out, stats, Ci, Co, H*W, x.stride(0), tiles, BCO=BC, BP=BP, num_warps=8 if BCI == 512 else 4, **options)
        ctx.save_for_backward(x, scale, shift, weight, out)
        wide, size = options['EXACT'] or BCI*BCO >= 256*128, BCI*BCO
        warps = 4 if size <= 64*64 else 8 if size < 256*128 else 16
        ctx.options = options | dict(BCO=BCO, BP=32 if wide else BACKWARD_PIXELS, num_warps=warps, num_stages=1 if wide else 2)
        return out, stats

    @staticmethod
    def backward(ctx, g, gstats):
        x, scale, shift, weight, out = ctx.saved_tensors
        (N, Ci, H, W), Co = x.shape, weight.shape[0]
        tiles = triton.cdiv(H*W, ctx.options['BP'])
        programs = min(N*tiles, SMS*(4 if ctx.options['num_warps'] == 4 else 1))   # as many as run at once: each leaves a whole gradient of the weight
        gx, sums = new(x, N, Ci, H, W), new(x, programs, Co if scale is None else Co + 2, Ci, dtype=torch.float32)   # of weight, scale, shift
        _pointwise_backward[(programs,)](g.contiguous(), out, gstats[..., 0].contiguous(), x, scale, shift, weight, gx, sums,
                                         Ci, Co, H*W, x.stride(0), tiles, N*tiles, **ctx.options)
        gweight, *affine = sums.sum(0).split([Co] + [1]*(sums.shape[1] - Co))
        return gx, *([t[0] for t in affine] or (None, None)), gweight.view(weight.shape), None, None


class Dense(torch.autograd.Function):
    "The 3×3 convolution of a picture that needs no gradient, and the sums of its output."
    @staticmethod
    def forward(ctx, x, weight, stride):
        (N, Ci, H, W), Co = x.shape, weight.shape[0]
        Ho, Wo, BP = (H - 1)//stride + 1, (W - 1)//stride + 1, 64
        tiles = triton.cdiv(Ho*Wo, BP)
        ctx.programs, ctx.sizes = min(N*tiles, 8*SMS), (Ci, Co, H, W, Ho, Wo, tiles, N*tiles)
        ctx.options = dict(STRIDE=stride, BT=_padded(9*Ci), BCO=_padded(Co), BP=BP)
        out, stats = new(x, N, Co, Ho, Wo), new(x, 2, Co, ctx.programs, dtype=torch.float32)
        _dense_forward[(ctx.programs,)](x, weight, out, stats, *ctx.sizes, **ctx.options)
        ctx.save_for_backward(x, weight, out)
        return out, stats

    @staticmethod
    def backward(ctx, g, gstats):
        x, weight, out = ctx.saved_tensors
        gweight = new(weight, ctx.programs, *weight.shape)
        _dense_backward[(ctx.programs,)](g.contiguous(), out, gstats[..., 0].contiguous(), x, gweight, *ctx.sizes, **ctx.options)
        return None, gweight.sum(0), None


class Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stats, gamma, beta, bn, count):
        C, P = gamma.numel(), stats[0, 0].numel()
        scale, shift, saved = new(gamma, C), new(gamma, C), new(gamma, 2, C)
        _normalise_forward[(C,)](stats, gamma, beta, bn.running_mean, bn.running_var, scale, shift, saved, C, P, float(count), bn.momentum, bn.eps,
                                 B=min(4096, triton.next_power_of_2(P)))
        ctx.save_for_backward(gamma, saved)
        ctx.count, ctx.shape = count, stats.shape
        return scale, shift

    @staticmethod
    def backward(ctx, gscale, gshift):
        gamma, saved = ctx.saved_tensors
        C = gamma.numel()
        gstats, ggamma, gbeta = new(gamma, 2, C), new(gamma, C), new(gamma, C)
        _normalise_backward[(1,)](gscale.contiguous(), gshift.contiguous(), gamma, saved, gstats, ggamma, gbeta, C, float(ctx.count), B=triton.next_power_of_2(C))
        return gstats.view(2, C, *[1]*(len(ctx.shape) - 2)).expand(ctx.shape), ggamma, gbeta, None, None


class Excite(torch.autograd.Function):
    "Scale and shift [N, C] of normalisation and spatial weighting in one, from a depthwise convolution's statistics."
    @staticmethod
    def forward(ctx, stats, scale, shift, w1, b1, w2, b2, pixels):
        (_, C, N, parts), R = stats.shape, w1.shape[0]
        a, b, saved, padded = new(scale, N, C), new(scale, N, C), new(scale, N, 3*C + R), dict(BC=triton.next_power_of_2(C), BR=triton.next_power_of_2(R))
        _excite_forward[(N,)](stats, scale, shift, w1, b1, w2, b2, a, b, saved, N, C, R, parts, pixels, BP=triton.next_power_of_2(parts), **padded)
        ctx.save_for_backward(scale, shift, w1, w2, saved)
        ctx.options = stats.shape, pixels, padded
        return a, b

    @staticmethod
    def backward(ctx, ga, gb):
        scale, shift, w1, w2, saved = ctx.saved_tensors
        shape, pixels, padded = ctx.options
        (_, C, N, _), R = shape, w1.shape[0]
        gstats, slopes = new(scale, 2, C, N, 1), new(scale, N, 3*C + R)
        _excite_backward[(N,)](ga.contiguous(), gb.contiguous(), scale, shift, w1, w2, saved, gstats, slopes, N, C, R, pixels, **padded)
        gscale, gshift, gb2, gb1 = slopes.sum(0).split([C, C, C, R])
        _, means, _, hidden = saved.split([C, C, C, R], 1)
        second, first = slopes[:, 2*C:].split([C, R], 1)
        return gstats.expand(shape), gscale, gshift, (first.t() @ means).view(w1.shape), gb1, (second.t() @ hidden).view(w2.shape), gb2, None


class Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        N, C, H, W = x.shape
        stats = new(x, 2, C, N, dtype=torch.float32)
        _plane_sums[(N*C,)](x, stats, C, H*W, N, B=min(2048, triton.next_power_of_2(H*W)))
        ctx.save_for_backward(x)
        return x.view_as(x), stats

    @staticmethod
    def backward(ctx, g, gstats):
        x, = ctx.saved_tensors
        (N, C, H, W), out = x.shape, torch.empty_like(x)
        B = min(2048, triton.next_power_of_2(H*W))
        _plane_sums_backward[(N*C, triton.cdiv(H*W, B))](g.contiguous(), x, gstats.contiguous(), out, C, H*W, N, B=B)
        return out


class Entry(torch.autograd.Function):
    "Of each map its left half and its right half, and all right halves pooled to the coarsest size, one after the other."
    @staticmethod
    def forward(ctx, *maps):
        N, (h, w) = maps[0].shape[0], maps[-1].shape[2:]
        halves = [x.shape[1]//2 for x in maps]
        pooled, first = new(maps[0], N, sum(halves), h, w), 0
        for x, C in zip(maps, halves):
            right = x[:, C:]
            H, W = x.shape[2:]
            chunks, tile = _tiles(x.shape)
            _pool[(N*C, chunks)](right, pooled, C, H, W, x.stride(0), x.stride(1), pooled.stride(0), first, U=W//w, **tile)
            first += C
        ctx.shapes = [x.shape for x in maps]
        return (*[x[:, :C] for x, C in zip(maps, halves)], *[x[:, C:] for x, C in zip(maps, halves)], pooled)

    @staticmethod
    def backward(ctx, *grads):
        n, first, out = len(ctx.shapes), 0, []
        pooled = grads[-1].contiguous()
        for (N, C2, H, W), left, right in zip(ctx.shapes, grads[:n], grads[n:2*n]):
            gx, (chunks, tile) = new(right, N, C2, H, W), _tiles(right.shape)
            assert left.stride()[2:] == (W, 1)
            _entry_backward[(N*C2, chunks)](left, right.contiguous(), pooled, gx, C2//2, H, W, left.stride(0), left.stride(1), pooled.stride(0), first, U=W//pooled.shape[3], **tile)
            first += C2//2
            out.append(gx)
        return tuple(out)


class Assemble(torch.autograd.Function):
    "Left channels and scaled right channels in turn."
    @staticmethod
    def forward(ctx, left, y, a, b):   # a, b: [N, C]
        N, C, H, W = y.shape
        out, B = new(y, N, 2*C, H, W), min(2048, triton.next_power_of_2(H*W))
        _assemble_forward[(N*C, triton.cdiv(H*W, B))](left, y, a, b, out, C, H*W, left.stride(0), B=B)
        ctx.save_for_backward(y, a)
        return out

    @staticmethod
    def backward(ctx, g):
        y, a = ctx.saved_tensors
        N, C, H, W = y.shape
        g = g.contiguous()
        gy, ga, gb = torch.empty_like(y), torch.empty_like(a), torch.empty_like(a)
        _assemble_backward[(N*C,)](g, y, a, gy, ga, gb, H*W, B=min(2048, triton.next_power_of_2(H*W)))
        return g[:, 0::2], gy, ga, gb


class Pending(NamedTuple):
    "A map as the convolution left it, with the normalisation and activation that its readers apply."
    raw: Tensor
    scale: Tensor = None
    shift: Tensor = None
    relu: bool = False
    stats: Tensor = None
    up: int = 1


class Add(torch.autograd.Function):
    "The sum of up to four pending maps, some of them enlarged; with `total`, also before the ReLU."
    @staticmethod
    def forward(ctx, ups, relu_in, twice, total, relu, *tensors):   # raw, scale, shift of each
        x, n = tensors[0], len(ups)
        (N, C), (H, W) = x.shape[:2], [s*ups[0] for s in x.shape[2:]]
        out = new(x, N, C, H, W)
        before = new(x, N, C, H, W) if total else None
        chunks, tile = _tiles(out.shape)
        terms = [*tensors, *[None]*(12 - 3*n)]
        options = dict(T=n, RELU_IN=relu_in, TWICE=twice, TOTAL=total, RELU=relu, **tile)
        for k in range(4): options |= {f'U{k}': ups[k] if k < n else 1, f'A{k}': terms[3*k + 1] is not None}
        _sum_forward[(N*C, chunks)](*terms, before, out, C, H, W, **options)
        ctx.save_for_backward(out if relu else None, *tensors)
        ctx.options, ctx.chunks, ctx.size = options, chunks, (N, C, H, W)
        return (before, out) if total else out

    @staticmethod
    def backward(ctx, *grads):
        out, *tensors = ctx.saved_tensors
        N, C, H, W = ctx.size
        g, gtotal, arguments, results = grads[-1].contiguous(), grads[0].contiguous() if ctx.options['TOTAL'] else None, [], []
        for raw, scale, shift in zip(tensors[::3], tensors[1::3], tensors[2::3]):
            gx, sums = torch.empty_like(raw), None if scale is None else new(raw, 2, C, N*ctx.chunks, dtype=torch.float32)
            arguments += [raw, scale, shift, gx, sums]
            results.append((gx, sums))
        arguments += [None]*(20 - len(arguments))
        _sum_backward[(N*C, ctx.chunks)](g, gtotal, out, *arguments, C, H, W, ctx.chunks, **ctx.options)
        flat = []
        for gx, sums in results: flat += [gx, *(sums.sum(-1) if sums is not None else (None, None))]
        return (None,)*5 + tuple(flat)


class Blend(torch.autograd.Function):
    "share[0]·fine + share[1]·(coarse, enlarged twice, bilinear)."
    @staticmethod
    def forward(ctx, fine, coarse, share):
        N, C, H, W = fine.shape
        out = torch.empty_like(fine)
        chunks, tile = _tiles(fine.shape)
        _blend_forward[(N*C, chunks)](fine, coarse, share, out, H, W, **tile)
        ctx.save_for_backward(fine, coarse, share)
        return out

    @staticmethod
    def backward(ctx, g):
        fine, coarse, share = ctx.saved_tensors
        N, C, H, W = coarse.shape
        chunks, tile = _tiles(coarse.shape, 1024)
        gfine, gcoarse, gshare = torch.empty_like(fine), torch.empty_like(coarse), new(share, 2, N*C*chunks)
        _blend_backward[(N*C, chunks)](g.contiguous(), fine, coarse, share, gfine, gcoarse, gshare, H, W, chunks, **tile)
        return gfine, gcoarse, gshare.sum(-1)


# ---- the network
BIG = 65536   # bytes of the largest 1×1 convolution's weight, padded, that the kernels take

def ready(x: Pending) -> Tensor:
    "The map itself."
    if x.scale is None and not x.relu and x.up == 1: return x.raw
    return Add.apply((x.up,), x.relu, False, False, False, x.raw, x.scale, x.shift)

def convolve(x: Pending, conv: nn.Conv2d) -> Pending:
    weight = conv.weight
    if conv.groups > 1: return _with_stats(Depthwise.apply(x.raw, x.scale, x.shift, None, None, None, weight, x.relu, conv.stride[0]))
    if conv.kernel_size == (1, 1) and _padded(weight.shape[0])*_padded(weight.shape[1])*x.raw.element_size() <= BIG:
        return _with_stats(Pointwise.apply(x.raw, x.scale, x.shift, weight, x.relu, False))
    if conv.kernel_size == (3, 3) and x.scale is None and not x.raw.requires_grad: return _with_stats(Dense.apply(x.raw, weight.contiguous(), conv.stride[0]))
    return _with_stats(Sums.apply(F.conv2d(ready(x), weight.to(x.raw.dtype), stride=conv.stride, padding=conv.padding).contiguous()))   # channels-last weights give such maps

def _with_stats(pair): return Pending(pair[0], stats=pair[1])

def normalise(x: Pending, bn: nn.BatchNorm2d) -> Pending:
    N, C, H, W = x.raw.shape
    scale, shift = Normalise.apply(x.stats, bn.weight, bn.bias, bn, N*H*W)
    return Pending(x.raw, scale, shift)

def layers_of(module):
    from captcha_hrnet.model import ConvUnit
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        for part in module: yield from layers_of(part)
    elif isinstance(module, ConvUnit):
        yield module.conv; yield module.bn
        if module.activation: yield nn.ReLU()
    else: yield module

def run(module, x) -> Pending:
    "A chain of layers on a map."
    if not isinstance(x, Pending): x = Pending(x)
    for layer in layers_of(module):
        if isinstance(layer, nn.Conv2d): x = convolve(x, layer)
        elif isinstance(layer, nn.BatchNorm2d): x = normalise(x, layer)
        elif isinstance(layer, nn.ReLU): x = x._replace(relu=True)
        elif isinstance(layer, nn.Upsample): x = x._replace(up=int(layer.scale_factor))
        else: assert isinstance(layer, nn.Identity), layer
    return x

def weigh(block, maps):
    "A conditional-channel-weighting block."
    n, cross = len(maps), block.cross_resolution_weighting
    *halves, pooled = Entry.apply(*maps)
    gates = normalise(convolve(run(cross.conv1, pooled), cross.conv2.conv), cross.conv2.bn)
    gates = zip(*[t.split(cross.channels, axis) for t, axis in ((gates.raw, 1), (gates.scale, 0), (gates.shift, 0))])
    out = []
    for left, right, gate, depthwise, weighting in zip(halves[:n], halves[n:], gates, block.depthwise_convs, block.spatial_weighting):
        y, stats = Depthwise.apply(right, None, None, *gate, depthwise.conv.weight, False, 1)
        x = normalise(Pending(y, stats=stats), depthwise.bn)
        layers = [p for layer in (weighting.conv1.conv, weighting.conv2.conv) for p in (layer.weight, layer.bias)]
        out.append(Assemble.apply(left, y, *Excite.apply(stats, x.scale, x.shift, *layers, y.shape[2]*y.shape[3])))
    return out

def fuse(module, maps):
    out = []
    for target, paths in enumerate(module.fuse_layers):
        terms = [run(path, x) for path, x in zip(paths, maps)]
        flat = [t for x in terms for t in (x.raw, x.scale, x.shift)]
        result = Add.apply(tuple(x.up for x in terms), False, True, target == 0, True, *flat)
        if target == 0:
            total, result = result
            maps = [total, *maps[1:]]
        out.append(result)
    return out

def stem(module, image):
    x = run(module.conv1, image)
    left, right = [Pending(r, a, b, True) for r, a, b in zip(x.raw.chunk(2, 1), x.scale.chunk(2), x.shift.chunk(2))]
    left = ready(run(module.branch1, left))
    for part in (module.expand_conv, module.depthwise_conv, module.linear_conv): right = run(part, right)
    right = ready(right)
    return torch.stack([left, right], 2).flatten(1, 2)

def backbone(net, image):
    maps = [stem(net.stem, image)]
    for change, stage in ((net.transition0, net.stage0), (net.transition1, net.stage1), (net.transition2, net.stage2)):
        maps = [ready(run(layer, x)) for layer, x in zip(change, [*maps, maps[-1]])]
        for module in stage:
            for block in module.layers: maps = weigh(block, maps)
            maps = fuse(module, maps)
    return maps

def neck(fpn, maps):
    *finer, top = [ready(run(lateral, x)) for lateral, x in zip(fpn.laterals, maps)]
    for x, share, smooth in reversed(list(zip(finer, fpn.shares(), fpn.smooth))):
        top = ready(run(smooth, Blend.apply(x, top, share)))
    return top

def forward(model, image, dtype=torch.bfloat16):
    torch._foreach_add_([module.num_batches_tracked for module in model.modules() if isinstance(module, nn.BatchNorm2d)], 1)
    image = model.prepare(image)
    features = neck(model.neck, backbone(model.backbone, image.to(dtype).contiguous()))
    outputs = {}
    for name, head in model.heads.items():
        x = run(head.hidden, features)
        out, _ = Pointwise.apply(x.raw, x.scale, x.shift, head.out.weight, x.relu, True)
        outputs[name] = out + head.out.bias[:, None, None]
    return outputs | {'valid': model.valid_cells(image)}
