"""Conversation -> text and trained spans: render by the chat template, locate messages, verify."""
