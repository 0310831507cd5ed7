"""Instructions: JSON lines of chats, or of prompts and answers, to tokens of which the assistant's are marked."""
