"""The followed row to the walk's sections on data and pretraining: text, tokens, rows, attention, losses, updates.

Every value comes from the code that the section names: there is no second implementation to explain the first.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanochat.data.document_shards import pack_source
from nanochat.data.documents import read_documents
from nanochat.data.packing import Packer
from nanochat.data.row_order import RowOrder
from nanochat.data.tokenizer import Tokenizer, train_tokenizer
from nanochat.evaluation.bits_per_byte import bits_per_byte
from nanochat.model.attention import attention
from nanochat.model.gpt import GPT, Attention, rotate
from nanochat.model.loss import token_losses
from nanochat.model.optimizer import MuonAdamW
from nanochat.pages.charts import Series, line_chart
from nanochat.pages.walk_artifacts import Section, Values, Walk, piece_lengths, shown_tokens
from nanochat.training.schedules import lr_factor
from nanochat.training.step import TrainingStep

SHOWN_CHARS = 900
SHOWN_TOKENS = 60
SHOWN_LOSSES = 260
SHOWN_PAIRS = 8
SHOWN_HEADS = 8
SHOWN_CONTEXT = 16
TOP_TOKENS = 5
QUERY = 96
"""Position whose attention is shown; with short windows one that lies far enough behind them to show their edge."""
SEARCHED_ROWS = 2048
"""Validation rows that are looked through for one that several documents share."""
FALLBACK_WORD = "strawberry"


def text_values(walk: Walk) -> Values:
    """Return the beginning of the followed document, where it comes from, and what is held out there."""
    text = walk.tokenizer.decode(walk.document[1:])
    shard = next(shard for shard in walk.shards.split("validation") if shard.rows)
    return {
        "text": text[:SHOWN_CHARS],
        "cut": len(text) > SHOWN_CHARS,
        "bytes": len(text.encode()),
        "source": shard.source,
        "by_hash": shard.skipped["other_split"] > 0,
    }


def token_values(walk: Walk) -> Values:
    """Return the document's first tokens, and one of its words in several spellings."""
    tokenizer = walk.tokenizer
    word = longest_split_word(tokenizer, tokenizer.decode(walk.document[1:]))
    letter = max(sorted(set(word)), key=word.count)
    spellings = dict.fromkeys((word, f" {word}", word.capitalize(), word.upper()))
    return {
        "tokens": shown_tokens(tokenizer, walk.document[:SHOWN_TOKENS]),
        "vocab_size": tokenizer.vocab_size,
        "word": word,
        "letter": letter,
        "letters": word.count(letter),
        "spellings": [shown_tokens(tokenizer, tokenizer.encode_ordinary(spelling)) for spelling in spellings],
    }


def row_values(walk: Walk) -> Values:
    """Return how the row is filled, the first row that documents share, and the row's first inputs and targets."""
    tokenizer, row = walk.tokenizer, walk.row
    shared = next(
        (
            (number, other)
            for number, other in zip(range(SEARCHED_ROWS), walk.validation_rows())
            if sum(length > 1 for length in piece_lengths(other, tokenizer.bos)) > 1
        ),
        None,
    )
    pairs = [shown_tokens(tokenizer, pair) for pair in itertools.pairwise(row[: SHOWN_PAIRS + 1])]
    return {
        "row_tokens": len(row),
        "pieces": _pieces(tokenizer, row),
        "shared": shared and {"number": shared[0], "pieces": _pieces(tokenizer, shared[1])},
        "pairs": pairs,
    }


def attention_values(walk: Walk) -> Values:
    """Return one query's attention weights: in the first layer and the last, or in a short and a full window."""
    _, model = walk.models
    windows = model.config.windows
    query = min(max([QUERY, *(window + QUERY // 3 for window in windows[:-1] if window < len(walk.row) - 1)]),
                len(walk.document) - 1, len(walk.row) - 2)  # fmt: skip
    tokens = walk.row[: query + 1]
    layers = []
    for layer in sorted({windows.index(min(windows)), model.config.n_layer - 1}):
        weights_HS = attention_weights(model, torch.tensor([tokens]), layer)
        heads = weights_HS[:SHOWN_HEADS]
        # The first token and the query itself often take most: the head that looks elsewhere says more.
        head = int(heads[:, 1:-1].sum(dim=1).argmax()) if query > 1 else 0
        peak = float(heads[head].max())
        largest = heads[head].topk(min(TOP_TOKENS, query + 1))
        layers.append(
            {
                "layer": layer,
                "window": min(windows[layer], len(walk.row) - 1),
                "head": head,
                "sum": float(weights_HS[head].sum()),
                "tokens": shown_tokens(walk.tokenizer, tokens, (heads[head] / peak).tolist()),
                "largest": _bars(walk.tokenizer, [tokens[place] for place in largest.indices], largest.values),
                "heads": (heads / heads.amax(dim=1, keepdim=True)).tolist(),
            }
        )
    return {"query": query, "token": shown_tokens(walk.tokenizer, [tokens[query]])[0], "layers": layers}


def loss_values(walk: Walk) -> Values:
    """Return the loss of each token before and after training, with the row's mean and bits per byte."""
    targets = torch.tensor(walk.row[1:])
    bytes_T = torch.from_numpy(walk.tokenizer.token_bytes())[targets]
    blind = math.log(walk.tokenizer.vocab_size)
    models = []
    for name, losses_T in zip(("Before training", "After training"), walk.losses, strict=True):
        nats = float((losses_T * (bytes_T > 0)).sum(dtype=torch.float64))
        shown = losses_T[:SHOWN_LOSSES]
        tokens = shown_tokens(walk.tokenizer, walk.row[1 : len(shown) + 1], (shown / blind).clamp(0, 1).tolist())
        models.append(
            {
                "name": name,
                "mean": float(losses_T.mean()),
                "bpb": bits_per_byte(nats, int(bytes_T.sum())),
                "tokens": [token | {"nats": float(loss)} for token, loss in zip(tokens, shown)],
            }
        )
    return {
        "models": models,
        "blind": blind,
        "vocab_size": walk.tokenizer.vocab_size,
        "shown": min(SHOWN_LOSSES, len(targets)),
        "targets": len(targets),
    }


def prediction_values(walk: Walk) -> Values:
    """Return the likeliest next tokens before and after training, where the model does well, fairly and badly."""
    tokenizer, document = walk.tokenizer, walk.document
    row_1T = torch.tensor([walk.row[:-1]])
    _, after = walk.losses
    by_loss = after[: max(len(document) - 1, 1)].argsort()
    positions = list(dict.fromkeys(int(by_loss[int(share * (len(by_loss) - 1))]) for share in (0.1, 0.5, 0.9)))
    with torch.no_grad():
        before_PV, after_PV = (model.logits(model(row_1T)[0, positions]).softmax(dim=-1) for model in walk.models)
    places = []
    for place, position in enumerate(positions):
        truth = walk.row[position + 1]
        columns = []
        for name, probabilities_V in (("Before training", before_PV[place]), ("After training", after_PV[place])):
            top = probabilities_V.topk(TOP_TOKENS)
            bars = _bars(tokenizer, top.indices.tolist(), top.values, truth)
            columns.append({"name": name, "bars": bars, "truth": float(probabilities_V[truth])})
        context = tokenizer.decode(walk.row[max(1, position - SHOWN_CONTEXT + 1) : position + 1])
        places.append({"context": context, "truth": shown_tokens(tokenizer, [truth])[0], "columns": columns})
    return {"places": places}


def update_values(walk: Walk) -> Values:
    """Return the learning rate over the run, and how often the rows of the first step were trained on."""
    plan = walk.checkpoint.state["plan"]
    num_steps, rows_per_step = plan["num_steps"], plan["rows_per_step"]
    order = RowOrder(walk.shards.groups("train"), walk.config.seed)
    steps = range(0, num_steps, max(1, num_steps // 300))
    factors = [(step, lr_factor(walk.config, step, num_steps)) for step in steps]
    epochs = walk.checkpoint.state["step"] * rows_per_step / order.rows_per_epoch
    return {
        "chart": line_chart("Learning rate (share of its peak)", [Series("learning rate", factors)], from_zero=True),
        "rows_per_step": rows_per_step,
        "first_rows": order.locate(0, min(rows_per_step, SHOWN_PAIRS)).tolist(),
        "rows_per_epoch": order.rows_per_epoch,
        "epochs": epochs,
        "seen": (math.floor(epochs), math.ceil(epochs)),
    }


PRETRAIN_SECTIONS = (
    Section("text", "The text", (read_documents,), text_values),
    Section("tokens", "Its tokens", (train_tokenizer, Tokenizer.encode_ordinary), token_values),
    Section("row", "Its packed row", (pack_source, Packer), row_values),
    Section("attention", "One row of attention", (Attention, rotate, attention), attention_values),
    Section("loss", "Loss per token", (GPT.token_losses, token_losses, bits_per_byte), loss_values),
    Section("predictions", "The next token", (GPT.logits,), prediction_values),
    Section("updates", "How it was learned", (RowOrder, TrainingStep, MuonAdamW, lr_factor), update_values),
)


def attention_weights(model: GPT, tokens_1T: Tensor, layer: int) -> Tensor:
    """Return how much the last of some tokens attends to each of them in a layer, weights_HT; each row sums to 1.

    The layer runs on its real input with one-hot values, so that its output is its weights: queries, keys, rotation,
    window and softmax are the model's own. A head has D channels, so T tokens take ceil(T / D) copies of the row.
    """
    block_attention = model.blocks[layer].attn
    seen: dict[str, Any] = {}
    hooks = [
        block_attention.register_forward_pre_hook(lambda module, inputs: seen.update(inputs=inputs)),
        block_attention.c_proj.register_forward_pre_hook(lambda module, inputs: seen.update(output=inputs[0])),
    ]
    try:
        with torch.no_grad():
            model(tokens_1T)
            x_1TC, value_embedding_1TC, rotation, window, *_ = seen["inputs"]
            T, D = tokens_1T.shape[1], model.config.head_dim
            copies = -(-T // D)
            x_BTC = x_1TC.expand(copies, -1, -1)
            embedding_BTC = None if value_embedding_1TC is None else value_embedding_1TC.expand(copies, -1, -1)
            block_attention(x_BTC, embedding_BTC, rotation, window, layer, _OneHotValues(), None)
    finally:
        for hook in hooks:
            hook.remove()
    y_BHD = seen["output"].view(copies, T, model.config.n_head, D)[:, -1]
    return y_BHD.transpose(0, 1).reshape(model.config.n_head, copies * D)[:, :T]


class _OneHotValues:
    """A cache that puts in the place of row b's values ones at channel d of token b * D + d."""

    position_BT = previous_BT = torch.empty(0)  # only a layer runs with it

    def attend(self, layer: int, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int) -> Tensor:
        B, T, _, D = v_BTGD.shape
        one_hot_BTD = torch.eye(T, B * D).view(T, B, D).transpose(0, 1)
        return attention(q_BTHD, k_BTGD, one_hot_BTD[:, :, None].expand_as(v_BTGD), window=window)


def longest_split_word(tokenizer: Tokenizer, text: str) -> str:
    """Return the text's word of lower-case letters that takes most tokens, the first of several; or a fallback."""
    words = dict.fromkeys(re.findall(r"\b[a-z]{6,16}\b", text))
    counts = {word: len(tokenizer.encode_ordinary(f" {word}")) for word in words}
    return max((word for word in words if counts[word] > 1), key=lambda word: counts[word], default=FALLBACK_WORD)


def _pieces(tokenizer: Tokenizer, row: Sequence[int]) -> list[Values]:
    pieces, start = [], 0
    for length in piece_lengths(row, tokenizer.bos):
        text = tokenizer.decode(row[start + 1 : start + min(length, 24)])
        pieces.append({"length": length, "text": " ".join(text.split())[:60], "padding": length == 1})
        start += length
    return pieces


def _bars(tokenizer: Tokenizer, ids: Sequence[int], shares: Tensor, truth: int | None = None) -> list[Values]:
    return [
        token | {"share": share, "truth": token["id"] == truth}
        for token, share in zip(shown_tokens(tokenizer, ids), shares.tolist(), strict=True)
    ]
