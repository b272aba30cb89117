"""Language models: against torch.nn modules, gradients, causality, counted work."""

import math

import pytest
import torch
from test_optimizees import (
    check_gradient,
    check_vmap,
    check_work,
    perturbed,
)
from torch import nn

from l2olib.language import LSTMLanguageModel, TransformerLanguageModel

MODELS = {
    "lstm": LSTMLanguageModel(11, 6, embedding=3, hidden=4),
    "transformer": TransformerLanguageModel(11, 6, layers=2, width=8, heads=2),
}
every_model = pytest.mark.parametrize("name", MODELS)


def text(count: int = 7, length: int = 6):
    gen = torch.Generator().manual_seed(0)
    words = torch.randint(11, (count, length + 1), generator=gen)
    return words[:, :-1], words[:, 1:]


def torch_lstm(p, x):
    """nn.LSTM has gates i, f, g, o, two biases, and no 1 added to the forget gate."""

    def reorder(weight):
        i, g, f, o = weight.chunk(4, -1)
        return torch.cat([i, f, g, o], -1)

    module = nn.LSTM(3, 4, batch_first=True).double()
    gates = reorder(p["gates"])
    module.weight_ih_l0.data, module.weight_hh_l0.data = gates[:3].T, gates[3:].T
    module.bias_ih_l0.data = reorder(p["gates_bias"])
    module.bias_hh_l0.data = torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat_interleave(4)
    start = tuple(p[k].expand(1, len(x), -1).contiguous() for k in ("hidden", "cell"))
    return module.double()(p["embedding"][x], start)[0]


def torch_transformer(p, x):
    mask = nn.Transformer.generate_square_subsequent_mask(6).double()
    h = p["embedding"][x]
    for k in range(2):
        layer = nn.TransformerEncoderLayer(
            8, 2, 32, 0.0, lambda z: nn.functional.gelu(z, approximate="tanh"),
            batch_first=True, norm_first=True,
        ).double()  # fmt: skip
        attention = layer.self_attn
        parts = ("query", "key", "value")
        attention.in_proj_weight.data = torch.cat([p[f"{k}{n}"].T for n in parts])
        attention.in_proj_bias.data = torch.cat([p[f"{k}{n}_bias"] for n in parts])
        for module, name in (
            (attention.out_proj, "out"),
            (layer.linear1, "up"),
            (layer.linear2, "down"),
        ):
            module.weight.data = p[f"{k}{name}"].T
            module.bias.data = p[f"{k}{name}_bias"]
        for module, name in ((layer.norm1, "attend"), (layer.norm2, "dense")):
            module.weight.data = p[f"{k}{name}_scale"]
            module.bias.data = p[f"{k}{name}_offset"]
        h = layer(h, src_mask=mask)
    last = nn.LayerNorm(8).double()
    last.weight.data, last.bias.data = p["last_scale"], p["last_offset"]
    return last(h)


@every_model
def test_losses_equal_those_of_torch_modules(name):
    model, (x, y) = MODELS[name], text()
    params = perturbed(model)
    p = model.layout.views(params)
    h = torch_lstm(p, x) if name == "lstm" else torch_transformer(p, x)
    logits = h @ p["w"] + p["b"]
    each = nn.CrossEntropyLoss(reduction="none")(logits.transpose(1, 2), y)
    found = model.losses(params, (x, y))
    assert found.shape == (7,)
    assert torch.allclose(found, each.mean(1), rtol=1e-10, atol=0)
    wrong = (logits.argmax(-1) != y).double().mean(1)
    assert torch.allclose(model.errors(params, (x, y)), wrong, rtol=1e-14)


@every_model
def test_later_words_do_not_change_earlier_scores(name):
    model, (x, _) = MODELS[name], text()
    params = perturbed(model)
    before = model.logits(params, x)
    for place in range(1, 6):
        changed = x.clone()
        changed[:, place] = (changed[:, place] + 1) % 11
        after = model.logits(params, changed)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place], before[:, place])


@every_model
def test_gradients_equal_finite_differences(name):
    check_gradient(MODELS[name], text())


@every_model
def test_replicas_under_vmap_equal_a_loop(name):
    check_vmap(MODELS[name], text())


@every_model
def test_work_equals_what_torch_counts(name):
    check_work(MODELS[name], text(4))


@every_model
def test_a_fresh_model_knows_nothing(name):
    """A loss near ln(vocabulary), at the widths of the tasks."""
    sizes = {"lstm": LSTMLanguageModel, "transformer": TransformerLanguageModel}
    model = sizes[name](500, 16)
    words = torch.arange(64).view(4, 16) * 7 % 500
    loss = model.losses(model.init(0), (words, (words + 1) % 500)).mean().item()
    assert math.log(500) - 0.1 < loss < math.log(500) + 1


def test_initial_weights_of_the_transformer():
    """Inside: variance 2 / layers / fan-in; embedding and head: cut normals."""
    model = TransformerLanguageModel(2_000, 16)
    views = model.layout.views(model.init(0))
    for name, deviation in (
        ("0query", math.sqrt(2 / 5 / 256)),
        ("4down", math.sqrt(2 / 5 / 1024)),
        ("w", 0.8796 / 16),
        ("embedding", 0.8796),
    ):
        assert views[name].std().item() == pytest.approx(deviation, rel=0.01), name
    assert views["3dense_scale"].eq(1).all() and views["3up_bias"].eq(0).all()
