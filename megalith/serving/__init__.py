"""A server around a trained model: Megatron's PUT /api, OpenAI's completions and chat, and a page to try them."""
