"""Rewards as users write them, for `"reward": {"kind": "factory"}` in tests; started from this folder."""


def letters():
    """The share of small letters, of twelve."""

    def reward(prompts, responses):
        return [sum(letter.isascii() and letter.islower() for letter in text) / 12 for text in responses]

    return reward


def short():
    return lambda prompts, responses: [1 / (1 + len(text)) for text in responses]
