"""A reward as TRL users write it: lists in, a list of numbers (or None) out."""
import re


def right_and_short(prompts, completions, answer, **kwargs):
    rewards = []
    for completion, right in zip(completions, answer):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        numbers = re.findall(r"-?\d+", text)
        correct = bool(numbers) and numbers[-1] == right
        rewards.append(float(correct) - 0.001 * len(text))
    return rewards
