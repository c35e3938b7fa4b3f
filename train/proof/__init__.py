"""The proof: several attentions train the same GPT, and a rule says whether they agree."""
