"""nanochat on Ray: from raw text to a chat model in the browser. The packages, in the order data flows through them.

config      every knob: one frozen dataclass and one file per stage
data        raw text -> text shards -> tokenizer -> token shards -> rows of a step
model       rows -> loss: transformer, attention, optimiser, the depth dial
training    loss -> checkpoints: one optimiser step, the pretraining loop, metrics
inference   checkpoint -> text: KV cache, sampling
evaluation  checkpoint -> scores: bits per byte
pages       a run -> report.html and walk.html
cluster     the only Ray code: sessions, parallel maps, data streams, trainers

Beside them: errors.py (what can go wrong), storage.py (where files lie), run_context.py (who a worker is),
provenance.py (what made an artifact).
"""

__version__ = "0.1.0"
