"""Sentence embeddings with SentenceTransformerTrainer; the loss is the one line that is replaced.

Run it with ``python examples/sentence_embeddings.py``. The model is made here and has two small
layers, so nothing is downloaded: put ``SentenceTransformer("your/model")`` and your pairs there.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    models,
)
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer

from alphacl_fast import micro_batched

# was: from sentence_transformers.losses import MultipleNegativesRankingLoss
from alphacl_fast.compat.sentence_transformers import MultipleNegativesRankingLoss

STEPS, BATCH = 20, 8
WORDS = ["a", "cat", "dog", "bird", "sits", "runs", "sleeps", "on", "under", "the", "mat", "tree"]


def small_model(folder: Path) -> SentenceTransformer:
    """Two layers with random weights and a vocabulary of a few words."""
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS) + 4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    words = models.Transformer(str(folder))
    return SentenceTransformer(modules=[words, models.Pooling(16)], device="cpu").double()


class InMicroBatches(nn.Module):
    """A model whose activations are those of a few sentences at a time."""

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return micro_batched(self.model, features, self.size)


def train(criterion: Callable[[nn.Module], nn.Module], micro_batch: int = 3) -> list[float]:
    """The losses of some steps."""
    torch.manual_seed(0)
    pick = torch.randint(len(WORDS), (STEPS * BATCH, 5)).tolist()
    anchors = [" ".join(WORDS[k] for k in row) for row in pick]
    positives = [" ".join(WORDS[k] for k in row[::-1][:4]) for row in pick]
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        model = small_model(Path(folder))
        loss = criterion(InMicroBatches(model, micro_batch))
        loss.register_forward_hook(lambda module, given, value: losses.append(value.item()))
        arguments = SentenceTransformerTrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=1e-3,
            use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, seed=0,
        )  # fmt: skip
        pairs = Dataset.from_dict({"anchor": anchors, "positive": positives})
        SentenceTransformerTrainer(model, arguments, train_dataset=pairs, loss=loss).train()
    return losses


if __name__ == "__main__":
    print(train(MultipleNegativesRankingLoss))
