"""A second implementation of the whole forward, in numpy and float64, one position at a time, from the description.

It shares no code with the library. `Description` holds every constant, so that a test can put a wrong one in.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

FLOAT32_EPSILON = 2.0**-23


@dataclass
class Description:
    n_head: int
    n_kv_head: int
    windows: list[int]
    vocab_size: int
    rope_theta: float = 100_000.0
    rope_sign: float = -1.0
    qk_gain: float = 1.2
    softcap: float = 15.0
    value_gate_scale: float = 3.0
    epsilon: float = FLOAT32_EPSILON
    norm_before_rope: bool = False
    middle_layer: int | None = None
    parameters: dict[str, np.ndarray] = field(default_factory=dict)


def parameters_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy() for name, value in model.state_dict().items()}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every parameter so large that each part of the model shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(generator=generator)
            if name == "resid_lambdas":
                value.mul_(0.2).add_(1.0)
            elif value.dim() == 1:
                value.mul_(0.3).add_(0.5)
            elif name == "lm_head.weight":
                value.mul_(6 * value.shape[1] ** -0.5)
            elif not name.startswith(("transformer.wte", "value_embeds")):
                value.mul_(value.shape[1] ** -0.5)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms_normalise(x, epsilon):
    return x / np.sqrt(np.mean(x * x) + epsilon)


def rope(x, position, d: Description):
    """Rotate each pair (x[i], x[i + D/2]) in the plane by sign * position * theta^(-2i/D)."""
    half = len(x) // 2
    y = np.empty_like(x)
    for i in range(half):
        angle = d.rope_sign * position * d.rope_theta ** (-2 * i / len(x))
        y[i] = np.cos(angle) * x[i] - np.sin(angle) * x[i + half]
        y[i + half] = np.sin(angle) * x[i] + np.cos(angle) * x[i + half]
    return y


def naive_attention(q, k, v, window, document=None):
    """One row: q (T, H, D), k and v (T, G, D)."""
    T, H, D = q.shape
    shared = H // k.shape[1]
    y = np.zeros_like(q)
    for t in range(T):
        for h in range(H):
            seen = [s for s in range(T) if t - window <= s <= t and (document is None or document[s] == document[t])]
            scores = np.array([q[t, h] @ k[s, h // shared] / np.sqrt(D) for s in seen])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            y[t, h] = sum(weight * v[s, h // shared] for weight, s in zip(weights, seen))
    return y


def smeared(x, d: Description, document):
    p, y = d.parameters, x.copy()
    for t in range(1, len(x)):
        if document is None or document[t] == document[t - 1]:
            gate = p["smear_lambda"][0] * sigmoid(p["smear_gate.weight"][0] @ x[t, :24])
            y[t] += gate * x[t - 1]
    return y


def queries_keys_values(n, token, position, layer, d: Description):
    """One token's normalised stream to q (H, D), k and v (G, D)."""
    p, block, D = d.parameters, f"transformer.h.{layer}.attn.", len(n) // d.n_head
    q = (p[block + "c_q.weight"] @ n).reshape(d.n_head, D)
    k = (p[block + "c_k.weight"] @ n).reshape(d.n_kv_head, D)
    v = (p[block + "c_v.weight"] @ n).reshape(d.n_kv_head, D)
    if f"value_embeds.{layer}.weight" in p:
        embedding = p[f"value_embeds.{layer}.weight"][token].reshape(d.n_kv_head, D)
        for g in range(d.n_kv_head):
            v[g] += d.value_gate_scale * sigmoid(p[block + "ve_gate.weight"][g] @ n[:12]) * embedding[g]
    for vectors in (q, k):
        for h in range(len(vectors)):
            if d.norm_before_rope:
                vectors[h] = rope(rms_normalise(vectors[h], d.epsilon), position, d)
            else:
                vectors[h] = rms_normalise(rope(vectors[h], position, d), d.epsilon)
            vectors[h] *= d.qk_gain
    return q, k, v


def naive_hidden(tokens, d: Description, document=None):
    """One row of token ids to its final normalised hidden states (T, C)."""
    p, n_layer = d.parameters, len(d.windows)
    x = np.stack([rms_normalise(p["transformer.wte.weight"][token], d.epsilon) for token in tokens])
    if "smear_lambda" in p:
        x = smeared(x, d, document)
    x0 = x.copy()
    for layer in range(n_layer):
        block = f"transformer.h.{layer}."
        if "resid_lambdas" in p:
            x = p["resid_lambdas"][layer] * x + p["x0_lambdas"][layer] * x0
        each = [
            queries_keys_values(rms_normalise(x[t], d.epsilon), token, t, layer, d) for t, token in enumerate(tokens)
        ]
        y = naive_attention(*(np.stack(vectors) for vectors in zip(*each)), d.windows[layer], document)
        for t in range(len(tokens)):
            x[t] = x[t] + p[block + "attn.c_proj.weight"] @ y[t].reshape(-1)
            inner = np.maximum(p[block + "mlp.c_fc.weight"] @ rms_normalise(x[t], d.epsilon), 0) ** 2
            x[t] = x[t] + p[block + "mlp.c_proj.weight"] @ inner
        if layer == (n_layer // 2 if d.middle_layer is None else d.middle_layer):
            middle = x.copy()
    if "backout_lambda" in p:
        x = x - p["backout_lambda"][0] * middle
    return np.stack([rms_normalise(position, d.epsilon) for position in x])


def naive_logits(tokens, d: Description, document=None):
    """One row of token ids to capped logits (T, V)."""
    raw = naive_hidden(tokens, d, document) @ d.parameters["lm_head.weight"][: d.vocab_size].T
    return d.softcap * np.tanh(raw / d.softcap)


def naive_token_losses(tokens, targets, d: Description):
    """One row to its nats (T,), 0 where the target is -1."""
    logits = naive_logits(tokens, d)
    nats = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(targets)), np.maximum(targets, 0)]
    return np.where(np.array(targets) >= 0, nats, 0.0)
