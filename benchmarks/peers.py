"""The same networks in PyTorch, from the same weights: peers for the benchmarks, never imported by
the package.

Linear layers are F.linear on (out, in) weights, convolutions channels_last, attention SDPA.
"""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

BASE = 4  # side where the GAN's pictures begin and end


class Peer(torch.nn.Module):
    """Holds our parameters in torch's layouts under our names, and mirrors our layers."""

    def __init__(self, flat: dict[str, np.ndarray], *, depth: int, heads: int, patch: int = 0):
        super().__init__()
        self.depth, self.heads, self.patch, self.names = depth, heads, patch, {}
        if "positions" in flat:
            self.register_buffer("positions", torch.from_numpy(flat.pop("positions")))
        for name, value in flat.items():
            tensor = torch.from_numpy(np.array(value))
            if name.endswith("kernel") and tensor.ndim == 2:
                tensor = tensor.T.contiguous()
            if name.endswith("kernel") and tensor.ndim == 4:
                tensor = tensor.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
            attribute = name.removeprefix("params/").replace("/", "__")
            self.register_parameter(attribute, torch.nn.Parameter(tensor))
            self.names[name] = attribute

    def p(self, name):
        return getattr(self, name.replace("/", "__"), None)

    def dense(self, x, name):
        return F.linear(x, self.p(f"{name}/Dense_0/kernel"), self.p(f"{name}/Dense_0/bias"))

    def conv(self, x_BHWC, name):
        x = x_BHWC.permute(0, 3, 1, 2)  # a view: the memory is channels_last
        weight, bias = self.p(f"{name}/Conv_0/kernel"), self.p(f"{name}/Conv_0/bias")
        return F.conv2d(x, weight, bias, padding=1).permute(0, 2, 3, 1)

    def norm(self, x, name=None):
        scale = self.p(f"{name}/scale") if name else None
        return F.rms_norm(x, (x.shape[-1],), scale, 1e-6)

    def modulated(self, x, c_BD, name, parts=2):
        shape = (x.shape[0], *(1,) * (x.ndim - 2), -1)
        return [m.reshape(shape) for m in self.dense(c_BD, name).chunk(parts, -1)]

    def condition(self, t_B, pooled_BD):
        rates = torch.from_numpy(np.exp(np.linspace(0, np.log(1000.0), 64)).astype(np.float32))
        angle = t_B[:, None] * rates * (2 * math.pi / 10)
        h = self.dense(torch.cat([angle.sin(), angle.cos()], -1), "condition/time")
        h = h + self.dense(self.norm(pooled_BD, "condition/RMSNorm_0"), "condition/text")
        return F.silu(self.dense(F.silu(h), "condition/mix"))

    def tokens(self, seq_BLE, mask_BL, name="text"):
        tokens = self.dense(self.norm(seq_BLE, f"{name}/RMSNorm_0"), f"{name}/project")
        b = tokens.shape[0]
        tokens = torch.cat([self.p(f"{name}/null").expand(b, 1, -1), tokens], 1)
        return tokens, torch.cat([mask_BL.new_ones(b, 1), mask_BL], 1)

    def text_kv(self, seq_BLE, mask_BL):
        tokens, mask = self.tokens(seq_BLE, mask_BL)
        count = sum(
            a.startswith("kvs_") and a.endswith("k_norm__scale") for a in self.names.values()
        )
        return [self.keys_values(tokens, f"kvs_{i}") for i in range(count)], mask

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1))

    def queries(self, x, name):
        return self.norm(self.split(self.dense(x, f"{name}/q")), f"{name}/norm")

    def keys_values(self, x, name):
        k, v = self.split(self.dense(x, f"{name}/kv")).chunk(2, -1)
        return self.norm(k, f"{name}/k_norm"), v

    def attend(self, q, k, v, mask_BS=None):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = None if mask_BS is None else mask_BS[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(2)


def space_to_depth(x, n=2):
    b, h, w, c = x.shape
    x = x.reshape(b, h // n, n, w // n, n, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // n, w // n, -1)


def depth_to_space(x, n=2):
    b, h, w, _ = x.shape
    x = x.reshape(b, h, w, n, n, -1).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * n, w * n, -1)


class UNet(Peer):
    """t2i_jax.models.unet.Backbone."""

    def residual(self, x, c_BD, name):
        skip = (
            self.dense(x, f"{name}/skip")
            if self.p(f"{name}/skip/Dense_0/kernel") is not None
            else x
        )
        shift, scale = self.modulated(skip, c_BD, f"{name}/modulation")
        h = self.conv(F.silu(self.norm(skip, f"{name}/RMSNorm_0")), f"{name}/conv1")
        h = self.norm(h) * (1 + scale) + shift
        return skip + self.conv(F.silu(h), f"{name}/conv2")

    def attention(self, x_BHWC, c_BD, text, mask, name):
        shift, scale = self.modulated(x_BHWC, c_BD, f"{name}/modulation")
        x = (self.norm(x_BHWC) * (1 + scale) + shift).flatten(1, 2)
        q = self.queries(x, f"{name}/query")
        k, v = self.keys_values(x, f"{name}/picture")
        mask = torch.cat([mask.new_ones(x.shape[:2]), mask], 1)
        out = self.attend(q, torch.cat([k, text[0]], 1), torch.cat([v, text[1]], 1), mask)
        return x_BHWC + self.dense(out, f"{name}/out").reshape(x_BHWC.shape)

    def forward(self, x, t_B, seq_BLE, mask_BL, pooled_BD, text_kv=None):
        kvs, mask = self.text_kv(seq_BLE, mask_BL) if text_kv is None else text_kv
        c_BD = self.condition(t_B, pooled_BD)
        h, outer, inner = self.conv(space_to_depth(x), "enter"), [], []
        for i in range(self.depth):
            h = self.residual(h, c_BD, f"down_{i}")
            outer.append(h)
        h = self.dense(space_to_depth(h), "shrink")
        h = h + self.positions.reshape(h.shape[1:])
        for i in range(2 * self.depth):
            if i >= self.depth:
                h = h + inner.pop()
            h = self.residual(h, c_BD, f"blocks_{i}")
            h = self.attention(h, c_BD, kvs[i], mask, f"attentions_{i}")
            if i < self.depth:
                inner.append(h)
        h = depth_to_space(self.dense(h, "grow"))
        for i in range(self.depth):
            h = self.residual(torch.cat([h, outer.pop()], -1), c_BD, f"up_{i}")
        return depth_to_space(self.conv(F.silu(self.norm(h, "leave_norm")), "leave"))


class Generator(UNet):
    """t2i_jax.models.gan.Generator with depth 1."""

    def __init__(self, flat, **sizes):
        super().__init__(flat, **sizes)
        blocks = [a for a in self.names.values() if a.endswith("conv1__Conv_0__kernel")]
        level = lambda i: sum(a.startswith(f"levels_{i}__") for a in blocks)
        self.levels = list(itertools.takewhile(bool, map(level, itertools.count())))

    def forward(self, z_BZ, seq_BLE, mask_BL, pooled_BD):
        h = self.dense(torch.cat([z_BZ, self.norm(pooled_BD, "text_norm")], -1), "mapping_0")
        for i in (1, 2):
            h = self.dense(F.silu(h), f"mapping_{i}")
        c_BD = F.silu(h)
        tokens, mask = self.tokens(seq_BLE, mask_BL)
        x = self.dense(c_BD, "base").reshape(len(c_BD), BASE, BASE, -1)
        for i, blocks in enumerate(self.levels):
            if i:
                x = depth_to_space(self.dense(x, f"grow_{i - 1}"))
            for j in range(blocks):
                x = self.residual(x, c_BD, f"levels_{i}/Residual_{j}")
                if x.shape[1] <= 2 * BASE:
                    kv = self.keys_values(tokens, f"levels_{i}/kvs_{j}")
                    x = self.attention(x, c_BD, kv, mask, f"levels_{i}/attentions_{j}")
        return self.conv(F.silu(self.norm(x, "leave_norm")), "leave")


class Discriminator(Peer):
    """t2i_jax.models.gan.Discriminator with one block at each size.

    (image_BHWC, *texts), a text is (seq_BLE, mask_BL, pooled_BD) -> for each text
    logit_B, image_BD, regions_BTD, text_BD, words_BLD
    """

    def forward(self, image_BHWC, *texts):
        x, i = self.conv(image_BHWC, "enter"), 0
        while x.shape[1] > 2 * BASE:
            x = self.shrink(self.block(x, i), i)
            i += 1
        return [self.beside(x, i, *text) for text in texts]

    def beside(self, regions, i, seq_BLE, mask_BL, pooled_BD):
        text = self.dense(self.norm(pooled_BD, "text_norm"), "text")
        tokens, mask = self.tokens(seq_BLE, mask_BL, "words")
        x = self.block(regions + self.read(regions, tokens, mask), i)
        x = self.block(self.shrink(x, i), i + 1)
        h = leaky(self.dense(leaky(x).flatten(1), "mix/Dense_0"))
        embed = lambda x, name: unit(self.dense(x, f"verdict/{name}_embedding"))
        found = embed(h, "image"), embed(regions.flatten(1, 2), "region")
        found += embed(text, "text"), embed(tokens[:, 1:], "word")
        fits = (self.dense(text, "verdict/fits") * h).sum(-1) / h.shape[-1] ** 0.5
        real = F.linear(h, self.p("verdict/real/kernel"), self.p("verdict/real/bias"))[:, 0]
        words = word_scores(found[1], found[3], mask_BL)
        return real + fits + self.p("verdict/word_weight") * words, *found

    def block(self, x, i):
        h = self.conv(leaky(x), f"blocks_{i}/Conv_0")
        return x + self.conv(leaky(h), f"blocks_{i}/Conv_1")

    def shrink(self, x, i):
        return self.dense(space_to_depth(x), f"shrink_{i}/Dense_0")

    def read(self, x, tokens, mask):
        flat = x.flatten(1, 2)
        out = self.attend(self.queries(flat, "query"), *self.keys_values(tokens, "keys"), mask)
        return self.dense(out, "out").reshape(x.shape)


def leaky(x):
    return F.leaky_relu(x, 0.2)


def unit(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-8)


def word_scores(regions, words, mask, temperature=0.2):
    """t2i_jax.models.gan.word_scores."""
    cosine = torch.einsum("...td,...ld->...lt", regions, words)
    found = torch.einsum("...lt,...td->...ld", torch.softmax(cosine / temperature, -1), regions)
    fit = (found * words).sum(-1) * torch.rsqrt(found.square().sum(-1) + 1e-6)
    return (fit * mask).sum(-1) / mask.sum(-1).clamp(min=1)


class Transformer(Peer):
    """t2i_jax.models.transformer.Backbone."""

    def block(self, x, c_BD, text, mask, name):
        mods = self.modulated(x, c_BD, f"{name}/modulation", 9)
        h = self.norm(x) * (1 + mods[1]) + mods[0]
        q, (k, v) = self.queries(h, f"{name}/query"), self.keys_values(h, f"{name}/picture")
        x = x + self.dense(self.attend(q, k, v), f"{name}/out") * mods[2]
        q = self.queries(self.norm(x) * (1 + mods[4]) + mods[3], f"{name}/cross_query")
        x = x + self.dense(self.attend(q, *text, mask), f"{name}/cross_out") * mods[5]
        h = self.norm(x) * (1 + mods[7]) + mods[6]
        h = F.silu(self.dense(h, f"{name}/mlp_gate")) * self.dense(h, f"{name}/mlp_up")
        return x + self.dense(h, f"{name}/mlp_leave") * mods[8]

    def forward(self, x, t_B, seq_BLE, mask_BL, pooled_BD, text_kv=None):
        kvs, mask = self.text_kv(seq_BLE, mask_BL) if text_kv is None else text_kv
        c_BD = self.condition(t_B, pooled_BD)
        h = self.dense(space_to_depth(x, self.patch), "embed")
        rows, columns = h.shape[1:3]
        h = h.flatten(1, 2) + self.positions
        for i in range(self.depth):
            h = self.block(h, c_BD, kvs[i], mask, f"blocks_{i}")
        shift, scale = self.modulated(h, c_BD, "leave_modulation")
        h = self.norm(h, "leave_norm") * (1 + scale) + shift
        h = self.dense(h, "leave").unflatten(1, (rows, columns))
        return depth_to_space(h, self.patch)
