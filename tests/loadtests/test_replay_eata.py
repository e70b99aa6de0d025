"""The replay against a record that a plain training loop makes here, and, where the files are, the authors' own."""

import copy
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from loadtests import replay_eata

CLASSES = 3
E_0, EPSILON = 0.9 * math.log(CLASSES), 0.99
CONFIG = replay_eata.CONFIG.__class__(
    entropy_margin=E_0, redundancy_margin=EPSILON, optimizer="adam", learning_rate=1e-2, anchor_weight=1.0
)


def tiny_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, CLASSES))
    model[4].weight.data *= 4
    return model


def record(model, source, streams):
    """EATA as a training loop writes it: train mode, torch's Adam, boolean indexing."""
    model = copy.deepcopy(model).train()
    norm = model[1]
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    learned = {"1.weight": norm.weight, "1.bias": norm.bias}
    start = {name: p.detach().clone() for name, p in learned.items()}
    fisher = {name: torch.zeros_like(p) for name, p in learned.items()}
    for x in source:
        logits = model(x)
        grads = torch.autograd.grad(functional.cross_entropy(logits, logits.argmax(1)), list(learned.values()))
        for name, grad in zip(learned, grads, strict=True):
            fisher[name] += grad**2 / len(source)
    optimizer = torch.optim.Adam(learned.values(), lr=1e-2)
    mean_probs, out = None, {}
    for name, batches in streams.items():
        answers, reliable, selected = [], [], []
        for x in batches:
            logits = model(x)
            answers.append(logits.detach().numpy())
            probs = logits.softmax(1)
            entropy = -(probs * logits.log_softmax(1)).sum(1)
            keep = torch.where(entropy < E_0)[0]
            reliable.append(len(keep))
            if mean_probs is not None:
                keep = keep[functional.cosine_similarity(mean_probs[None], probs[keep], dim=1).abs() < EPSILON]
            selected.append(len(keep))
            if not len(keep):
                continue
            mean = probs[keep].detach().mean(0)
            mean_probs = mean if mean_probs is None else 0.9 * mean_probs + 0.1 * mean
            loss = (entropy[keep] * torch.exp(E_0 - entropy[keep].detach())).mean()
            loss = loss + sum((fisher[n] * (p - start[n]) ** 2).sum() for n, p in learned.items())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        out[f"{name}_logits"] = np.concatenate(answers)
        out[f"{name}_reliable"], out[f"{name}_selected"] = np.array(reliable), np.array(selected)
    out |= {f"param/{n}": p.detach().numpy() for n, p in learned.items()}
    out |= {f"fisher/{n}": f.numpy() for n, f in fisher.items()}
    return out | {"final_mean_probs": mean_probs.numpy()}


@pytest.fixture
def played():
    generator = torch.Generator().manual_seed(1)

    def batches(count, shift):
        return [torch.randn(8, 3, 4, 4, generator=generator) + shift for _ in range(count)]

    return batches(2, 0.0), {"fog": batches(4, 0.5), "snow": batches(4, -0.5)}


def test_the_same_trajectory(played):
    source, streams = played
    model = tiny_model()
    reference = record(model, source, streams)
    assert 0 < reference["fog_selected"].sum() < 32  # both filters have something to do
    labels = reference["fog_logits"].argmax(axis=1)
    found = replay_eata.replay(model, source, streams, labels, reference, CONFIG)
    assert found.same
    assert found.logits < 1e-4
    assert max(found.params, found.mean_probs, found.fisher) < 1e-5
    assert (found.batches, found.batches_with_other_counts) == (8, 0)
    assert found.errors["fog"] == (0.0, 0.0)
    assert found.errors["snow"][0] == found.errors["snow"][1]


def test_differences_are_found(played):
    source, streams = played
    model = tiny_model()
    reference = record(model, source, streams)
    reference["snow_logits"] = reference["snow_logits"] + np.float32(2e-3)
    reference["fog_reliable"] = reference["fog_reliable"] + [0, 1, 0, 0]
    reference["param/1.bias"] = reference["param/1.bias"] + np.float32(0.5)
    reference["fisher/1.weight"] = reference["fisher/1.weight"] + np.float32(0.25)
    found = replay_eata.replay(model, source, streams, np.zeros(32, dtype=np.int64), reference, CONFIG)
    assert not found.same
    assert found.logits == pytest.approx(2e-3, abs=1e-4)
    assert found.batches_with_other_counts == 1
    assert found.params == pytest.approx(0.5, abs=1e-4)
    assert found.fisher == pytest.approx(0.25, abs=1e-4)
    assert replay_eata.figures(found)["difference/fisher"] == found.fisher
    assert replay_eata.table(found).row_count == 7


def test_not_a_number_is_not_the_same():
    nan = replay_eata.Comparison(math.nan, 0, 0, 0, 1, 0, {})
    assert not nan.same


@pytest.mark.slow
def test_replay_on_the_authors_record():
    root = Path(__file__).resolve().parents[2]
    data = Path(os.environ.get("TTA_DATA") or root.parent / "shared" / "data" / "cifar")
    if not (data / "reference_eata.npz").is_file():
        pytest.skip("the CIFAR files are not here; TTA_DATA names their folder")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = replay_eata.replay_files(data)
    finally:
        torch.set_num_threads(threads)
    assert found.same, found
    assert found.batches_with_other_counts == 0
    assert {name: round(ours, 2) for name, (_, ours) in found.errors.items()} == {
        "gaussian_noise": 28.70,
        "contrast": 20.30,
    }
