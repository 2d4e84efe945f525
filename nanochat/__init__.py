"""nanochat on Ray: from raw text to a chat model in the browser. The packages, in the order data flows through them.

config      every knob: one frozen dataclass and one file per stage
data        raw text -> text shards -> tokenizer -> token shards -> rows of a step; conversations -> ids and loss mask
model       rows -> loss: transformer, attention, optimiser, the depth dial
training    loss -> checkpoints: the training loops of pretraining, fine-tuning and reinforcement learning
tasks       datasets that can be trained on and scored, and their mixtures -> rows
inference   checkpoint -> text: paged cache, sampling, engines (ours, vLLM), tool loop, calculator, sandbox, rollouts
exchange    checkpoint <-> the formats of others: Hugging Face folders, karpathy/nanochat's checkpoints
serving     text -> people and programs: OpenAI's API over HTTP, the chat page
evaluation  checkpoint -> scores: bits per byte, CORE, chat tasks
pages       a run -> report.html and walk.html
cluster     the only Ray code: sessions, maps, data streams, trainers, rollout actors, the endpoint's replicas

Beside them: errors.py (what can go wrong), storage.py (where files lie), run_context.py (who a worker is),
provenance.py (what made an artifact).
"""

__version__ = "0.1.0"
