"""Dialogs to token ids: Meta's prompts, other families' formats, chat templates."""
