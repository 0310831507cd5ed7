"""OpenAI's completions, chat completions and models, as its clients and those of other servers use them."""
