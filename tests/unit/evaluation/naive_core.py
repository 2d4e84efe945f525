"""A second CORE, from DCLM's description, one option at a time; it shares no code with the library's.

Texts are joined by hand, sequences are compared token by token, and each option is one whole forward with logits of
all positions.
"""

import random

import torch


def randomise(model, seed=0):
    """Draw every parameter so that each part of the model shows and no two options are near."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(generator=generator)
            if value.dim() == 1:
                value.mul_(0.3).add_(0.5)
            elif name == "lm_head.weight":
                value.mul_(6 * value.shape[1] ** -0.5)
            elif not name.startswith(("transformer.wte", "value_embeds")):
                value.mul_(value.shape[1] ** -0.5)
    return model


def naive_prompts(rows, index, kind, shots, delimiter):
    """Return the texts of the options, or the text without and with the continuation."""
    others = [i for i in range(len(rows)) if i != index]
    chosen = random.Random(1234 + index).sample(others, shots) if shots <= len(others) else others
    text = ""
    for i in chosen:
        row = rows[i]
        if kind == "multiple_choice":
            text += row["query"] + delimiter + row["choices"][row["gold"]] + "\n\n"
        elif kind == "schema":
            text += row["context_options"][row["gold"]] + delimiter + row["continuation"] + "\n\n"
        else:
            text += row["context"].strip() + delimiter + row["continuation"] + "\n\n"
    row = rows[index]
    if kind == "multiple_choice":
        return [text + row["query"] + delimiter + choice for choice in row["choices"]]
    if kind == "schema":
        return [text + context + delimiter + row["continuation"] for context in row["context_options"]]
    question = text + row["context"].strip() + delimiter
    return [question.strip(), question + row["continuation"]]


def naive_spans(kind, sequences):
    """Return (sequence, first scored place) of each option; the sequences begin with BOS."""
    if kind == "language_modeling":
        without, whole = sequences
        assert whole[: len(without)] == without
        return [(whole, len(without))]
    shortest = min(len(sequence) for sequence in sequences)
    shared = 0
    if kind == "multiple_choice":
        while shared < shortest and len({sequence[shared] for sequence in sequences}) == 1:
            shared += 1
        return [(sequence, shared) for sequence in sequences]
    while shared < shortest and len({sequence[-1 - shared] for sequence in sequences}) == 1:
        shared += 1
    return [(sequence, len(sequence) - shared) for sequence in sequences]


def naive_scores(forward, spans):
    """Return (mean nats, all greedy) of each span; `forward` gives the (T, V) logits of a list of ids."""
    scores = []
    for sequence, start in spans:
        logits = forward(sequence).float()
        nats, greedy = [], True
        for place in range(start, len(sequence)):
            log_probability = torch.log_softmax(logits[place - 1], dim=-1)
            nats.append(-float(log_probability[sequence[place]]))
            greedy = greedy and int(logits[place - 1].argmax()) == sequence[place]
        scores.append((sum(nats) / len(nats), greedy))
    return scores


def naive_choice(scores):
    """Return the first option of the lowest mean."""
    best = 0
    for option in range(1, len(scores)):
        if scores[option][0] < scores[best][0]:
            best = option
    return best


def naive_is_right(kind, row, scores):
    if kind == "language_modeling":
        return scores[0][1]
    return naive_choice(scores) == row["gold"]


def gpt_forward(model):
    """Return a function from ids to the (T, V) logits of our model, without cache or batch."""

    def forward(ids):
        with torch.no_grad():
            return model.logits(model(torch.tensor([ids])))[0]

    return forward
