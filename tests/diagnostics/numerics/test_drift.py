"""Early warnings: what is sampled in a forward, of which models, and when a number will matter."""

from __future__ import annotations

import importlib.util
import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from outlast.diagnostics.numerics import NumericsConfig, NumericsDrift, NumericsEvent, NumericsWatch
from outlast.diagnostics.numerics.attention import LOG_Z, ForwardSampler
from outlast.diagnostics.numerics.trend import Trend
from outlast.trainer.config import ModelConfig
from outlast.trainer.model import GPT


def test_a_line_is_followed_to_the_step_at_which_it_meets_the_limit() -> None:
    draw = random.Random(0)
    trend = Trend(10_000.0)
    told = [
        (step, drift)
        for step in range(0, 5000, 50)
        if (drift := trend.add(step, 100 + 2.5 * step + draw.gauss(0, 50))) is not None
    ]
    # It meets 10,000 at step 3960: told at first when that is four times as far as it was seen, then twice as near.
    first, drift = told[0]
    assert 700 <= first <= 1100
    assert drift.at_step is not None
    assert abs(drift.at_step - 3960) < 400
    assert [one.at_step is None for _, one in told] == [False] * (len(told) - 1) + [True]
    assert len(told) <= 8
    assert abs(told[-1][0] - 3960) <= 100


def test_numbers_that_fall_by_factors() -> None:
    trend = Trend(1e-7, falling=True, in_logs=True)
    told = [drift for step in range(200) if (drift := trend.add(step, 1e-3 * 0.93**step)) is not None]
    assert told[0].at_step == 127  # 1e-3 * 0.93**127 is the first below
    assert told[-1].at_step is None


@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_what_goes_nowhere_is_not_told(noise: float) -> None:
    draw = random.Random(0)
    for limit in (1.0, 3.0):
        trend = Trend(100.0 * limit)
        assert not any(trend.add(step, limit * (5 + noise * draw.gauss(0, 1))) for step in range(3000))
    falling = Trend(1e-7, falling=True, in_logs=True)
    assert not any(falling.add(step, 1e-3 * 2 ** draw.gauss(0, 1)) for step in range(3000))
    far = Trend(1e9)
    assert not any(far.add(step, 1.0 + step) for step in range(300))  # it rises, and will not matter for ages


def gpt() -> tuple[nn.Module, dict[str, Tensor]]:
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    model = GPT(ModelConfig(layers=2, heads=2, width=32, context=24))
    return model, {"tokens": tokens, "targets": tokens}


def of_transformers(name: str, attention: str) -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers

    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": 64, "attn_implementation": attention, "bos_token_id": 0, "eos_token_id": 0}
    if name == "gpt2":
        config = transformers.GPT2Config(
            n_layer=2, n_head=2, n_embd=32, n_positions=24, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0, **common
        )
        model: nn.Module = transformers.GPT2LMHeadModel(config)
    else:
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=64, **sizes, **common))
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    return model.train(), {"input_ids": tokens, "labels": tokens}


def samples(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[dict[str, float], Any]:
    model(**inputs)
    before = hooks_of(model)
    sampler = ForwardSampler(model, lambda: True)
    output = model(**inputs)
    found = {name: float(value) for name, value in sampler.samples.items()}
    sampler.close()
    assert hooks_of(model) == before
    return found, output


def hooks_of(model: nn.Module) -> list[tuple[int, int]]:
    return [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in model.modules()]


def test_our_own_model() -> None:
    model, inputs = gpt()
    found, _ = samples(model, inputs)
    assert found.keys() == {"blocks.0.attention", "blocks.1.attention", LOG_Z}
    # By hand: the first block's queries and keys of the first sequence, causal.
    assert isinstance(model, GPT)
    x = model.blocks[0].norm1(model.token(inputs["tokens"][:1]) + model.position.weight[:24])
    q, k, _ = model.blocks[0].attention.qkv(x).view(1, 24, 3, 2, 16).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-1, -2) / 4
    logits = logits.masked_fill(torch.ones(24, 24).triu(1).bool(), -torch.inf)
    assert found["blocks.0.attention"] == pytest.approx(float(logits.detach().max()), rel=1e-5)
    assert found[LOG_Z] == pytest.approx(5.55, abs=0.1)  # near that of 256 tokens that are equally likely


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_models_of_transformers_whichever_way_they_attend(name: str) -> None:
    by_kernel, output = samples(*of_transformers(name, "sdpa"))
    written_out, _ = samples(*of_transformers(name, "eager"))
    assert len(by_kernel) == 3
    assert all("attn" in one for one in by_kernel.keys() - {LOG_Z})
    assert by_kernel == pytest.approx(written_out, rel=1e-4)
    shifted = output.logits[:, :-1] if name == "none" else output.logits
    assert by_kernel[LOG_Z] == pytest.approx(float(shifted.detach().logsumexp(-1).mean()), rel=0.05)


def watched(
    model: nn.Module, optimizer: Any, every: int = 1, **settings: Any
) -> tuple[NumericsWatch, list[NumericsEvent]]:
    told: list[NumericsEvent] = []
    config = NumericsConfig(drift_every_steps=every, spikes=False, **settings)
    return NumericsWatch(model, optimizer, config, on_event=told.append), told


def test_attention_that_grows_is_told_before_it_matters() -> None:
    model, inputs = gpt()
    assert isinstance(model, GPT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch, told = watched(model, optimizer, every=2, attention_logit_limit=50.0)
    assert watch.not_watched == ["gradients are not compared with epsilon: the optimizer has none, as Adam has"]
    weight = model.blocks[1].attention.qkv.weight
    at_first, _ = samples(model, inputs)
    before = weight.detach().clone() * (0.5 / at_first["blocks.1.attention"]) ** 0.5  # a logit of a half
    for step in range(1, 121):
        with torch.no_grad():
            weight[:64] = before[:64] * (1 + step) ** 0.5  # queries and keys: their products grow by equal amounts
        model(**inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.end_step()
    watch.close()
    drifts = [one for one in told if isinstance(one, NumericsDrift)]
    assert {(one.what, one.where, one.count) for one in drifts} == {("attention logit", "blocks.1.attention", 1)}
    assert len(drifts) <= 8
    first = drifts[0]
    assert first.at_step == pytest.approx(99, abs=3)
    assert drifts[-1].at_step is None
    assert f"meets 50, where attention collapses to single tokens, at step {first.at_step}" in first.told


def test_gradients_that_sink_to_epsilon_name_the_parameter() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, eps=1e-8)
    watch, told = watched(model, optimizer)
    for step in range(1, 61):
        model(torch.ones(2, 4)).sum().backward()
        assert model[0].weight.grad is not None
        model[0].weight.grad *= 0.7**step
        optimizer.step()
        optimizer.zero_grad()
        watch.end_step()
    drifts = [one for one in told if isinstance(one, NumericsDrift)]
    assert {(one.what, one.where, one.count) for one in drifts} == {("gradient RMS", "0.weight", 1)}
    assert drifts[0].at_step is not None
    assert drifts[-1].at_step is None
    reached = drifts[-1].step
    assert abs(drifts[0].at_step - reached) <= 1
    assert drifts[-1].limit == pytest.approx(1e-7)
    assert any("no attention logits are sampled" in one for one in watch.not_watched)
    assert any("log Z is not sampled" in one for one in watch.not_watched)


def test_log_z_of_both_signs() -> None:
    model, inputs = gpt()
    assert isinstance(model, GPT)
    shift = nn.Parameter(torch.zeros(()))
    model.head.register_forward_hook(lambda module, args, output: output - shift)
    optimizer = torch.optim.SGD([*model.parameters(), shift], lr=0.0)
    watch, told = watched(model, optimizer, log_z_limit=60.0)
    for step in range(1, 40):
        with torch.no_grad():
            shift.fill_(2.0 * step)
        model(**inputs).backward()
        optimizer.step()
        watch.end_step()
    drifts = [one for one in told if isinstance(one, NumericsDrift)]
    assert {one.what for one in drifts} == {LOG_Z}
    assert drifts[-1].at_step is None
    assert drifts[0].at_step == pytest.approx(drifts[-1].step, abs=3)


def test_other_steps_and_evaluation_are_not_looked_into_and_compiled_code_is_left_out_by_name() -> None:
    model, inputs = gpt()
    asked: list[bool] = []
    sampler = ForwardSampler(model, lambda: asked.append(True) is None and len(asked) == 2)
    for _ in range(3):
        model(**inputs)
        assert bool(sampler.samples) == (len(asked) >= 2)
    model.eval()
    model(**inputs)
    with torch.no_grad():
        model.train()
        model(**inputs)
    assert len(asked) == 3
    model.token.register_forward_hook(lambda *_: 1 / 0)  # a forward that fails leaves nothing behind
    sampler._wanted = lambda: True
    with pytest.raises(ZeroDivisionError):
        model(**inputs)
    assert sampler._mode is None
    sampler.close()
    other, _ = gpt()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the compiler says of itself as it is imported
        other.blocks[0].compile()  # type: ignore[operator, union-attr]
    watch, _ = watched(other, torch.optim.AdamW(other.parameters()))
    assert watch.not_watched == ["attention logits and log Z are not sampled: parts of the model are compiled"]
