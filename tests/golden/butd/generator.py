#!/usr/bin/env python3
"""Deterministic random weights for the BUTD (R101-C4, 1600 objects + 400 attributes) detector.

Every tensor is drawn from numpy.random.RandomState(seed32(key, seed)); only BatchNorm running
statistics and three bias vectors come from the small calib_<seed>.npz beside the fixtures
(they were measured once with the reference model so that activations stay healthy).

    sd = make_state_dict(seed, "calib_11.npz")   # airsplay / detectron2 key names, float32
    hf = to_hf(sd)                                      # adds num_batches_tracked (HF checkpoint)
    mv = to_milvlg(sd)                                  # background-first layout + MILVLG head names
    sd50 = make_state_dict(seed, None, depth=50)        # tiny smoke model, no calibration

Only numpy is needed.  The layout conversions are plain permutations, see the functions.
"""

import zlib
import numpy as np

BLOCKS = {50: (3, 4, 6), 101: (3, 4, 23), 152: (3, 8, 36)}
GAIN = {
    "objectness_logits.weight": 0.7,
    "anchor_deltas.weight": 0.1,
    "cls_score.weight": 5.0,
    "bbox_pred.weight": 1.0,
    "cls_embedding.weight": 0.5,
    "attr_score.weight": 3.0,
}


def key_shapes(depth=101, classes=1600, attrs=400):
    """Ordered (key, shape) list: the 536 keys of the airsplay *_attr*.pkl checkpoint."""
    out = []

    def conv_bn(name, o, i, k):
        out.append((name + ".weight", (o, i, k, k)))
        for p in ("weight", "bias", "running_mean", "running_var"):
            out.append((name + ".norm." + p, (o,)))

    def stage(prefix, n, cin, mid, cout):
        for b in range(n):
            p = "%s.%d." % (prefix, b)
            if b == 0:
                conv_bn(p + "shortcut", cout, cin, 1)
            conv_bn(p + "conv1", mid, cin if b == 0 else cout, 1)
            conv_bn(p + "conv2", mid, mid, 3)
            conv_bn(p + "conv3", cout, mid, 1)

    conv_bn("backbone.stem.conv1", 64, 3, 7)
    n2, n3, n4 = BLOCKS[depth]
    stage("backbone.res2", n2, 64, 64, 256)
    stage("backbone.res3", n3, 256, 128, 512)
    stage("backbone.res4", n4, 512, 256, 1024)
    pg = "proposal_generator."
    out.append((pg + "anchor_generator.cell_anchors.0", (12, 4)))
    for n, s in (("conv", (512, 1024, 3, 3)), ("objectness_logits", (12, 512, 1, 1)), ("anchor_deltas", (48, 512, 1, 1))):
        out += [(pg + "rpn_head." + n + ".weight", s), (pg + "rpn_head." + n + ".bias", s[:1])]
    stage("roi_heads.res5", 3, 1024, 512, 2048)
    bp = "roi_heads.box_predictor."
    for n, s in (("cls_score", (classes + 1, 2048)), ("bbox_pred", (classes * 4, 2048))):
        out += [(bp + n + ".weight", s), (bp + n + ".bias", s[:1])]
    out.append((bp + "cls_embedding.weight", (classes + 1, 256)))
    for n, s in (("fc_attr", (512, 2304)), ("attr_score", (attrs + 1, 512))):
        out += [(bp + n + ".weight", s), (bp + n + ".bias", s[:1])]
    return out


def cell_anchors():
    """12 anchors, ratio-major then scale: (w, h) base 23x12, 16x16, 11x22 times 4, 8, 16, 32; centre 7.5."""
    rows = []
    for w, h in ((23, 12), (16, 16), (11, 22)):
        for s in (4, 8, 16, 32):
            hw, hh = 0.5 * (w * s - 1), 0.5 * (h * s - 1)
            rows.append((7.5 - hw, 7.5 - hh, 7.5 + hw, 7.5 + hh))
    return np.array(rows, np.float32)


def _rng(key, seed):
    return np.random.RandomState((zlib.crc32(key.encode()) ^ (seed * 2654435761 & 0xFFFFFFFF)) & 0xFFFFFFFF)


def draw(key, shape, seed):
    r = _rng(key, seed)
    if "cell_anchors" in key:
        return cell_anchors()
    if ".norm." in key:
        u = r.random_sample(shape)
        if key.endswith(".weight"):
            v = (0.8 + 0.4 * u) * (0.5 if ".conv3." in key else 1.0)
        elif key.endswith(".bias"):
            v = (u - 0.5) * 0.4
        elif key.endswith("running_mean"):
            v = (u - 0.5) * 0.4
        else:
            v = 0.8 + 0.4 * u
    elif key.endswith(".bias"):
        v = (r.random_sample(shape) - 0.5) * 0.2
    else:
        v = r.standard_normal(shape) * np.sqrt(2.0 / np.prod(shape[1:]))
        for suffix, g in GAIN.items():
            if key.endswith(suffix):
                v = v * g
    return np.ascontiguousarray(v, np.float32).reshape(shape)


def make_state_dict(seed, calib=None, depth=101, classes=1600, attrs=400):
    sd = {k: draw(k, s, seed) for k, s in key_shapes(depth, classes, attrs)}
    if calib is not None:
        c = np.load(calib)
        assert int(c["seed"]) == seed
        names = [k for k in sd if k.endswith(".running_mean")]
        mean, std, at = c["bn_mean"].astype(np.float32), c["bn_std"].astype(np.float32), 0
        for k in names:
            n = sd[k].shape[0]
            sd[k] = mean[at : at + n].copy()
            sd[k.replace("running_mean", "running_var")] = std[at : at + n] ** 2
            at += n
        assert at == mean.size
        for k in (
            "roi_heads.box_predictor.cls_score.bias",
            "roi_heads.box_predictor.attr_score.bias",
            "proposal_generator.rpn_head.objectness_logits.bias",
        ):
            sd[k] = c[k.split(".")[-2]].astype(np.float32)
    return sd


def to_hf(sd):
    """unc-nlp/frcnn-vg-finetuned layout: the same keys plus one int64 num_batches_tracked per BatchNorm."""
    out = dict(sd)
    for k in sd:
        if k.endswith("running_var"):
            out[k.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return out


def to_milvlg(sd):
    """MILVLG bua-caffe layout: index 0 = background / no-attribute, 24-channel RPN softmax, raw deltas."""
    bp, rh = "roi_heads.box_predictor.", "proposal_generator.rpn_head."
    first = lambda a: np.concatenate([a[-1:], a[:-1]], 0)
    w4 = np.array([10, 10, 5, 5], np.float32)
    out = {k: v for k, v in sd.items() if not k.startswith((bp, rh + "objectness"))}
    for p in ("weight", "bias"):
        out[bp + "cls_score." + p] = first(sd[bp + "cls_score." + p])
        d = sd[bp + "bbox_pred." + p]
        d = d / np.tile(w4, d.shape[0] // 4).reshape((-1,) + (1,) * (d.ndim - 1))
        out[bp + "bbox_pred." + p] = np.concatenate([np.zeros_like(d[:4]), d], 0)
        out[bp + "attr_linear1." + p] = sd[bp + "fc_attr." + p]
        out[bp + "attr_linear2." + p] = first(sd[bp + "attr_score." + p])
        o = sd[rh + "objectness_logits." + p]
        out[rh + "objectness_logits." + p] = np.concatenate([np.zeros_like(o), o], 0)  # 12 bg then 12 fg
    out[bp + "cls_embed.weight"] = first(sd[bp + "cls_embedding.weight"])
    return out


if __name__ == "__main__":
    import sys, hashlib

    s = int(sys.argv[1]) if len(sys.argv) > 1 else 11
    sd = make_state_dict(s, sys.argv[2] if len(sys.argv) > 2 else None)
    h = hashlib.sha256()
    for k in sd:
        h.update(k.encode())
        h.update(sd[k].tobytes())
    print(len(sd), "tensors", sum(v.size for v in sd.values()), "values sha256", h.hexdigest())
