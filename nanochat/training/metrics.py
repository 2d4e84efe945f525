"""Steps to numbers for people and programs: metrics.jsonl, samples.jsonl, Weights & Biases, a progress line."""

import json
import platform
import time
from typing import Any

from nanochat import storage
from nanochat.errors import ConfigError
from nanochat.storage import StageFolder
from nanochat.training.hardware import Hardware
from nanochat.training.plan import Plan


class StepClock:
    """Measures training time: steps and the waits for their data, not evaluations or checkpoints."""

    def __init__(self, plan: Plan, hardware: Hardware) -> None:
        self.plan, self.hardware = plan, hardware
        self.training_s = 0.0
        """Seconds spent on training steps over the whole run, resumes included."""
        self.waited_s = 0.0
        """Seconds blocked on the next rows since the last lap."""
        self._lap_s, self._lap_steps = 0.0, 0
        self._device_s: float | None = None
        self._mark_s = self._checked_s = time.perf_counter()

    def skip(self) -> None:
        """Leave out the time since the last mark."""
        self._mark_s = time.perf_counter()

    def count(self) -> float:
        """Count the time since the last mark as training time; returns it."""
        elapsed_s = time.perf_counter() - self._mark_s
        self._mark_s += elapsed_s
        self._lap_s += elapsed_s
        self.training_s += elapsed_s
        return elapsed_s

    def rows_arrived(self) -> None:
        """Count the time since the last mark as a wait for rows."""
        self.waited_s += self.count()

    def step_done(self, device_s: float | None) -> None:
        """Count the time since the last mark as the end of a step, of which a GPU computed `device_s`."""
        self.count()
        self._lap_steps += 1
        if device_s is not None:
            self._device_s = (self._device_s or 0.0) + device_s

    def every(self, seconds: float) -> bool:
        """Tell whether this many seconds have passed since this last said so."""
        now_s = time.perf_counter()
        if now_s - self._checked_s < seconds:
            return False
        self._checked_s = now_s
        return True

    def lap(self, step: int) -> dict[str, float | None]:
        """Return the rates since the last lap and start a new one; `step` is the one just done."""
        tokens_per_s = self._lap_steps * self.plan.tokens_per_step / self._lap_s
        flops_per_s = tokens_per_s * self.plan.flops_per_token
        peak = self.hardware.peak_flops
        record = {
            "tokens": (step + 1) * self.plan.tokens_per_step,
            "step_s": self._lap_s / self._lap_steps,
            "tokens_per_s": tokens_per_s,
            "flops_per_s": flops_per_s,
            "mfu": flops_per_s / peak if peak else None,
            "data_wait_s": self.waited_s,
            "data_wait_share": self.waited_s / self._lap_s,
            "device_share": None if self._device_s is None else self._device_s / self._lap_s,
            "training_s": self.training_s,
            "eta_s": (self.plan.num_steps - step - 1) * self._lap_s / self._lap_steps,
            "peak_memory_bytes": self.hardware.peak_memory_bytes(),
        }
        self._lap_s, self._lap_steps, self.waited_s, self._device_s = 0.0, 0, 0.0, None
        return record


class MetricsWriter:
    """Writes a stage's records; on workers other than the first it does nothing."""

    def __init__(self, folder: StageFolder, *, enabled: bool, wandb: bool, config: dict[str, Any]) -> None:
        self.folder, self.enabled = folder, enabled
        self._wandb = _start_wandb(folder, config) if wandb and enabled else None

    def begin(self, step: int) -> None:
        """Drop records of `step` and later, which a killed attempt left and this one makes again."""
        if not self.enabled:
            return
        for path in (self.folder.metrics, self.folder.samples, self.folder.groups):
            before = storage.read_jsonl(path)
            kept = [record for record in before if record["step"] < step]
            if len(kept) < len(before):
                with storage.atomic_write(path) as file:
                    file.write("".join(json.dumps(record) + "\n" for record in kept).encode())

    def write(self, record: dict[str, Any]) -> None:
        """Append a record, with the time of day."""
        if self.enabled:
            storage.append_jsonl(self.folder.metrics, record | {"time": time.time()})
        if self._wandb is not None:
            self._wandb.log({name: value for name, value in record.items() if name != "step"}, step=record["step"])

    def write_samples(self, step: int, samples: dict[str, str] | list[dict[str, Any]]) -> None:
        """Append the completions of the fixed prompts, or rollouts."""
        if self.enabled:
            storage.append_jsonl(self.folder.samples, {"step": step, "samples": samples})

    def write_groups(self, step: int, trained: list[int], dropped: list[int]) -> None:
        """Append the numbers of the groups that an update was made of, and of those that it left out."""
        if self.enabled:
            storage.append_jsonl(self.folder.groups, {"step": step, "trained": trained, "dropped": dropped})

    def close(self) -> None:
        """End the Weights & Biases run, if there is one."""
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(folder: StageFolder, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as err:
        raise ConfigError("wandb=True: the package is not installed. Run: pip install wandb") from err
    local = storage.filesystem(folder.root)[1] if storage.is_local(folder.root) else None
    run_id = storage.sha256_json([platform.node(), local] if local else folder.root)[:16]
    try:
        return wandb.init(project="nanochat", id=run_id, resume="allow", config=config, dir=local)
    except wandb.Error as err:
        raise ConfigError(f"wandb=True: {err} Run `wandb login`, or set WANDB_MODE=offline.") from err


def progress_line(record: dict[str, Any], num_steps: int, scored: dict[str, Any]) -> str:
    """Return one line for the terminal from a metrics record with a loss and the newest one with a score, or {}."""
    speed = f"{record['tokens_per_s']:,.0f} tok/s"
    if record["mfu"] is not None:
        speed += f", {record['mfu']:.1%} MFU"
    else:
        speed += f", {record['flops_per_s'] / 1e9:,.0f} GFLOP/s"
    bpb = f"{scored['val_bpb']:.3f}" if scored else "-"
    eta_s = round(record["eta_s"])
    return (
        f"step {record['step'] + 1:>5}/{num_steps}  loss {record['loss']:.3f}  val bpb {bpb}  {speed}  "
        f"data wait {record['data_wait_share']:.1%}  left {eta_s // 60}:{eta_s % 60:02d}"
    )


def held_out_text(scored: dict[str, Any]) -> str:
    """Return the share of held-out problems that are right, beside their mean reward where that says more."""
    right, reward = scored["held_out_pass_at_1"], scored["held_out_reward"]
    return f"{right:.1%}" if reward == right else f"{right:.1%} (reward {reward:.3f})"


def rl_progress_line(record: dict[str, Any], num_steps: int, scored: dict[str, Any]) -> str:
    """Return one line for the terminal from the record of an update of RL and the newest one with a score, or {}."""
    eta_s = round(record["eta_s"])
    held_out = held_out_text(scored) if scored else "-"
    most = max((int(name[8:]) for name in record if name.startswith("pass_at_")), default=1)
    return (
        f"step {record['step'] + 1:>5}/{num_steps}  reward {record['reward']:.3f}  "
        f"pass@{most} {record.get(f'pass_at_{most}', 0.0):.0%}  held out {held_out}  "
        f"{record['completion_tokens']:.0f} tokens, {record['truncated_share']:.0%} cut  "
        f"alike {record['zero_variance_share']:.0%}  stale {record['staleness']:.1f}  "
        f"KL {max(0.0, record['mismatch_kl']):.0e}  "
        f"entropy {record['entropy']:.2f}  "
        f"{record['tokens_per_s']:,.0f} tok/s  idle {record['learner_idle_share']:.0%} / "
        f"{record['rollout_idle_share']:.0%}  left {eta_s // 60}:{eta_s % 60:02d}"
    )
