"""Values of `PPOConfig` and `NLPOConfig` that change numbers or plumbing, and which are refused together."""

from tests.pairwise import Refusal


FACTORS = {
    "policy_objective": ["clip", "penalty", "pg"],
    "mask_top_p": [None, 1.0, 0.7],  # None: `PPOTrainer`, else `NLPOTrainer`
    "advantage_estimator": ["gae", "returns", "leave_one_out"],
    "baseline": ["none", "batch_mean"],
    "critic": ["adapter", "shared", "model", "none"],
    "kl_coef": [0.0, 0.3],
    "kl_estimator": ["k1", "k2", "k3"],
    "adaptive_kl_target": [None, 0.5],
    "penalty_kl_target": [None, 0.02],
    "entropy_bonus_coef": [0.0, 0.3],
    "epsilon": [0.2, 0.1],
    "epsilon_high": [None, 0.4],
    "delta": [None, 1.5],
    "epsilon_value": [0.2, None],
    "vf_coef": [0.1, 0.5],
    "whiten_rewards": [False, True],
    "whiten_advantages": [True, False],
    "gamma": [1.0, 0.9],
    "gae_lambda": [0.95, 0.8],
    "bootstrap_truncated": [False, True],
    "temperature": [1.0, 0.7],
    "num_generations": [1, 2],
    "reward_weights": [None, 0.5],
    "token_rewards": [False, True],
    "tuning": ["full", "lora", "adapter"],  # adapter: goes on from one, which is the reference
    "gradient_checkpointing": [False, True],
    "target_kl": [None, 1e-4],
    "critic_learning_rate": [None, 1e-2],
    "critic_warmup_rollouts": [0, 1],
    "num_iterations": [1, 4],
    "batching": ["1 x 8", "2 x 4", "2 steps"],  # micro-batches of one step; two steps of one
    "architecture": ["llama", "gpt2", "gemma3"],
}
"""The first value is the one that needs nothing of others, where there is such a value."""

WITH_CRITIC, NOT_CLIP = ["adapter", "shared", "model"], ["penalty", "pg"]
NOT_GAE = ["returns", "leave_one_out"]

REFUSED = [
    Refusal(
        {"advantage_estimator": ["gae"], "critic": ["none"]}, "advantage_estimator='gae' needs", "GAE reads values"
    ),
    Refusal(
        {"advantage_estimator": ["leave_one_out"], "num_generations": [1]},
        "advantage_estimator='leave_one_out' with num_generations=1",
        "there is no other completion to compare with",
    ),
    Refusal(
        {"advantage_estimator": ["leave_one_out"], "critic": WITH_CRITIC},
        "critic='.*' is not read by",
        "the bandit view has no values",
    ),
    Refusal(
        {"advantage_estimator": ["leave_one_out"], "gamma": [0.9]},
        "gamma=0.9 has no effect",
        "the bandit view adds rewards up",
    ),
    Refusal(
        {"baseline": ["batch_mean"], "advantage_estimator": ["gae", "leave_one_out"]},
        "baseline='batch_mean' has no effect",
        "both bring a baseline of their own",
    ),
    Refusal(
        {"baseline": ["batch_mean"], "critic": WITH_CRITIC},
        "baseline='batch_mean' has no effect",
        "the critic's value is the baseline",
    ),
    Refusal(
        {"baseline": ["batch_mean"], "whiten_advantages": [True]},
        "baseline='batch_mean' has no effect",
        "whitening takes any constant off again",
    ),
    Refusal(
        {"bootstrap_truncated": [True], "advantage_estimator": NOT_GAE},
        "bootstrap_truncated=True is read by",
        "only GAE reads the value after the last token",
    ),
    Refusal(
        {"gae_lambda": [0.8], "advantage_estimator": NOT_GAE}, "gae_lambda=0.8 has no effect", "only GAE has a lambda"
    ),
    Refusal(
        {"critic_learning_rate": [1e-2], "critic": ["none"]}, "critic_learning_rate=0.01 has no effect", "no critic"
    ),
    Refusal(
        {"critic_warmup_rollouts": [1], "critic": ["none"]}, "critic_warmup_rollouts=1 has no effect", "no critic"
    ),
    Refusal({"epsilon_value": [None], "critic": ["none"]}, "epsilon_value=None has no effect", "no critic"),
    Refusal({"vf_coef": [0.5], "critic": ["none"]}, "vf_coef=0.5 has no effect", "no critic"),
    Refusal({"kl_estimator": ["k2", "k3"], "kl_coef": [0.0]}, "kl_estimator='k.' has no effect", "no KL is charged"),
    Refusal(
        {"adaptive_kl_target": [0.5], "kl_coef": [0.0]},
        "kl_coef=0 stays 0 under adaptive_kl_target",
        "the rule multiplies",
    ),
    Refusal(
        {"penalty_kl_target": [0.02], "policy_objective": ["clip", "pg"]},
        "penalty_kl_target=0.02 has no effect",
        "there is no penalty",
    ),
    Refusal({"epsilon": [0.1], "policy_objective": NOT_CLIP}, "epsilon=0.1 has no effect", "nothing is clipped"),
    Refusal(
        {"epsilon_high": [0.4], "policy_objective": NOT_CLIP}, "epsilon_high=0.4 has no effect", "nothing is clipped"
    ),
    Refusal({"delta": [1.5], "policy_objective": NOT_CLIP}, "delta=1.5 has no effect", "nothing is clipped"),
    Refusal(
        {"target_kl": [1e-4], "policy_objective": ["pg"]}, "target_kl=0.0001 has no effect", "there is no old policy"
    ),
    Refusal(
        {"target_kl": [1e-4], "num_iterations": [1], "batching": ["1 x 8", "2 x 4"]},
        "target_kl=0.0001 has no effect",
        "the KL is taken before the only step, so it is 0",
    ),
    Refusal(
        {"policy_objective": ["pg"], "num_iterations": [4]},
        "policy_objective='pg' has no ratio.*num_iterations=1",
        "stale samples need a ratio",
    ),
    Refusal(
        {"policy_objective": ["pg"], "batching": ["2 steps"]},
        "policy_objective='pg' has no ratio.*steps_per_generation=1",
        "stale samples need a ratio",
    ),
    Refusal(
        {"policy_objective": ["penalty"], "mask_top_p": [0.7]},
        "policy_objective='penalty' takes its KL over the whole vocabulary",
        "the KL between two masks is infinite",
    ),
    Refusal(
        {"tuning": ["full"], "critic": ["adapter", "shared"]},
        "reward_adapter shares the base with the policy's adapter",
        "an adapter of a base that trains would drift with it",
    ),
]
