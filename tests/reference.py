"""Independent float64 references, written from the definitions: Python loops and O(T^2) sums, none of our code.

Inputs are nested lists (or anything indexable); masks are nested lists of bool. Outputs are nested lists or floats.
"""

import math


def real_positions(mask_row):
    return [t for t, real in enumerate(mask_row) if real]


def discounted_returns(rewards, mask, gamma):
    """Every reward-to-go as its own sum; the distance counts real tokens only."""
    out = [[0.0] * len(row) for row in rewards]
    for b, row in enumerate(rewards):
        real = real_positions(mask[b])
        for i, t in enumerate(real):
            out[b][t] = sum(gamma ** (j - i) * row[real[j]] for j in range(i, len(real)))
    return out


def gae(rewards, values, mask, gamma, lam, bootstrap=None):
    """Schulman 2016, Eq. 16, as the explicit sum of discounted TD errors."""
    advantages = [[0.0] * len(row) for row in rewards]
    returns = [[0.0] * len(row) for row in rewards]
    for b, row in enumerate(rewards):
        real = real_positions(mask[b])
        v = [values[b][t] for t in real] + [0.0 if bootstrap is None else bootstrap[b]]
        deltas = [row[t] + gamma * v[i + 1] - v[i] for i, t in enumerate(real)]
        for i, t in enumerate(real):
            advantages[b][t] = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(real)))
            returns[b][t] = advantages[b][t] + v[i]
    return advantages, returns


def leave_one_out(returns, group_size):
    out = []
    for i, own in enumerate(returns):
        start = i // group_size * group_size
        others = [returns[j] for j in range(start, start + group_size) if j != i]
        out.append(own - sum(others) / len(others))
    return out


def shaped_rewards(scores, kl, mask, kl_coef, token_rewards=None):
    out = [[0.0] * len(row) for row in kl]
    for b, row in enumerate(kl):
        real = real_positions(mask[b])
        for t in real:
            out[b][t] = -kl_coef * row[t] + (token_rewards[b][t] if token_rewards is not None else 0.0)
        if real:
            out[b][real[-1]] += scores[b]
    return out


def real_values(x, mask):
    return [x[b][t] for b, row in enumerate(mask) for t in real_positions(row)]


def mean(values):
    return sum(values) / len(values) if values else 0.0


def variance(values):
    center = mean(values)
    return mean([(value - center) ** 2 for value in values])


def whiten(x, mask, shift_mean):
    values = real_values(x, mask)
    center, scale = mean(values), 1.0 / math.sqrt(variance(values) + 1e-8)
    add = 0.0 if shift_mean else center
    return [
        [(x[b][t] - center) * scale + add if real else 0.0 for t, real in enumerate(row)] for b, row in enumerate(mask)
    ]


def ppo_clip(logps, old_logps, advantages, mask, low, high, delta=None):
    """Loss and metrics, by the four cases of Schulman 2017, Fig. 1, instead of a min."""
    new, old, adv = (real_values(x, mask) for x in (logps, old_logps, advantages))
    losses, outside, binding, kls = [], [], [], []
    ratios = [math.exp(n - o) for n, o in zip(new, old, strict=True)]
    for ratio, a in zip(ratios, adv, strict=True):
        free = ratio if delta is None else min(ratio, delta)
        if a >= 0 and free > 1 + high:
            used, bound = 1 + high, a > 0
        elif a < 0 and ratio < 1 - low:
            used, bound = 1 - low, True
        else:
            used, bound = free, False
        losses.append(-used * a)
        binding.append(float(bound))
        outside.append(float(not 1 - low <= ratio <= 1 + high))
        kls.append(ratio - 1 - math.log(ratio))
    metrics = {
        "approx_kl": mean(kls),
        "clip_fraction": mean(outside),
        "clip_fraction_binding": mean(binding),
        "ratio_mean": mean(ratios),
        "ratio_max": max(ratios, default=0.0),
        "ratio_min": min(ratios, default=0.0),
    }
    return sum(losses), metrics


def value_loss(values, old_values, returns, mask, epsilon):
    """Sum over tokens of 0.5 max(...)."""
    total = 0.0
    triples = zip(*(real_values(x, mask) for x in (values, old_values, returns)), strict=True)
    for v, old, target in triples:
        kept = v if epsilon is None else min(max(v, old - epsilon), old + epsilon)
        total += 0.5 * max((v - target) ** 2, (kept - target) ** 2)
    return total


def preference_row(rewards, targets, noise):
    """One row of real candidates; the largest reward is taken out so that nothing overflows."""
    top = max(rewards)
    weights = [math.exp(r - top) for r in rewards]
    probs = [(1 - noise) * w / sum(weights) + noise / len(rewards) for w in weights]
    return -sum(t * math.log(p) for t, p in zip(targets, probs, strict=True) if t > 0)


def preference_accuracy_row(rewards, targets):
    best = [k for k, t in enumerate(targets) if t == max(targets)]
    if len(best) > 1:
        return 0.5
    top = [k for k, r in enumerate(rewards) if r == max(rewards)]
    return 1.0 / len(top) if best[0] in top else 0.0


def preference_margin_row(rewards, targets):
    total = 0.0
    for k, (reward, target) in enumerate(zip(rewards, targets, strict=True)):
        total += target * (reward - mean([r for j, r in enumerate(rewards) if j != k]))
    return total


def kl_divergence(old_logits, logits):
    """KL(old || new) of two lists of logits."""

    def softmax(row):
        top = max(row)
        total = sum(math.exp(x - top) for x in row)
        return [math.exp(x - top) / total for x in row]

    return sum(p * math.log(p / q) for p, q in zip(softmax(old_logits), softmax(logits), strict=True))


def top_p(logits, p, min_tokens, keep_ids):
    """Add tokens, likeliest first, until their probability exceeds p."""
    top = max(logits)
    total = sum(math.exp(x - top) for x in logits)
    kept, reached = set(keep_ids), 0.0
    for rank, token in enumerate(sorted(range(len(logits)), key=lambda i: -logits[i])):
        if reached <= p or rank < min_tokens:
            kept.add(token)
        reached += math.exp(logits[token] - top) / total
    return [token in kept for token in range(len(logits))]
