"""Token shards of a few kilobytes, and the configuration of a run on them that takes a second."""

from pathlib import Path

import numpy as np

from data.shard_writer import ShardWriter
from models.config import ModelConfig
from training.config import Config

VOCAB, EOS = 120, 0


def write_shards(folder: Path, documents: int = 60, seed: int = 0, tokenizer: str = "0" * 64) -> Path:
    """`train` and two validation domains of documents that count up in steps of one to three: easy to learn."""
    generator = np.random.default_rng(seed)
    for name, count in (("train", documents), ("validation/even", 8), ("validation/odd", 6)):
        with ShardWriter(folder / name, vocab_size=VOCAB, eos_id=EOS, tokens_per_file=1500) as writer:
            texts = []
            for _ in range(count):
                start, step = generator.integers(1, VOCAB - 1), generator.integers(1, 4)
                texts.append([int(1 + (start + step * i) % (VOCAB - 1)) for i in range(generator.integers(20, 120))])
            writer.write(texts, text_bytes=4 * sum(map(len, texts)))
            writer.finish(tokenizer={"name": "counting", "sha256": tokenizer}, preparation={})
    return folder


def tiny_config(shards: Path, run_dir: Path) -> Config:
    """A two-layer MoDA model, twenty steps of four instances, on the CPU; checkpoints of steps 10 and 20."""
    config = Config()
    config.run.name, config.run.dir = run_dir.name, str(run_dir)
    config.model = ModelConfig(
        name="tiny",
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=48,
        vocab_size=VOCAB,
        depth_kv=True,
        ffn_kv_proj=True,
    )
    config.data.path, config.data.sequence_length = str(shards), 16
    config.training.steps, config.training.global_batch_size, config.training.micro_batch_size = 20, 4, 2
    config.training.device = "cpu"
    config.optimizer.lr, config.schedule.warmup_steps = 1e-2, 4
    config.evaluation.every, config.evaluation.instances = 10, 6
    config.checkpoint.every, config.logging.every = 10, 1
    config.checkpoint.asynchronous = False  # which begins saves earlier, by as many steps as a write takes
    config.logging.wandb.mode = "disabled"
    return config
