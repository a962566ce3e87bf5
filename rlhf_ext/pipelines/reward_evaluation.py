"""A trained reward model on labelled rows, row by row."""

from dataclasses import dataclass

from datasets import Dataset

from ..functional.candidates import arrange_rewards, candidates_loss
from ..functional.intervals import wilson_interval
from ..models.reward_functions import inference
from ..trainers.reward_trainer import PreferenceRewardTrainer


@dataclass
class RowScores:
    """What a reward model says of labelled rows.

    Attributes:
        accuracies (`list[float]`): per row 1, 0, or one half for a tie; for a ranking the share of its pairs.
        scores (`list[float]`): of all candidates of all rows, in the unit of the model.
    """

    accuracies: list[float]
    scores: list[float]

    def summary(self) -> dict[str, float | int | list[float]]:
        """`accuracy`, its 95% Wilson interval and `num_rows`."""
        right = sum(self.accuracies)
        return {
            "accuracy": right / len(self.accuracies),
            "interval": list(wilson_interval(right, len(self.accuracies))),
            "num_rows": len(self.accuracies),
        }


def score_rows(trainer: PreferenceRewardTrainer, dataset: Dataset) -> RowScores:
    """
    Score the rows of a dataset that the trainer prepared. Every process scores all of them and gets the same.

    Args:
        trainer ([`PreferenceRewardTrainer`]):
            Its model is read in evaluation mode and left as it was.
        dataset (`Dataset`):
            `trainer.train_dataset` or `trainer.eval_dataset`: tokenised candidates.
    """
    size, model, device = trainer.args.per_device_eval_batch_size, trainer.model, trainer.args.device
    found = RowScores([], [])
    with inference(model):
        for start in range(0, len(dataset), size):
            rows = [dataset[index] for index in range(start, min(start + size, len(dataset)))]
            batch = {name: tensor.to(device) for name, tensor in trainer.data_collator(rows).items()}
            masks = {}
            if trainer.args.reward_aggregation == "sum":
                masks["completion_mask"] = batch["completion_mask"]
            ids, mask = batch["input_ids"], batch["attention_mask"]
            scores = model(input_ids=ids, attention_mask=mask, use_cache=False, **masks).logits.squeeze(-1).float()
            rewards = arrange_rewards(scores, batch["candidate_mask"])
            found.scores += scores.tolist()
            for row in range(len(rows)):
                one = slice(row, row + 1)
                labels = (batch["targets"][one].to(rewards.dtype), batch["rankings"][one])
                _, metrics = candidates_loss(rewards[one], *labels, batch["candidate_mask"][one])
                found.accuracies.append(metrics["accuracy"].item())
    return found
