"""An offline world with a known gold reward: grammar, gold score, corpus, tokenizer and tiny model."""
