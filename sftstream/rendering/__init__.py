"""Conversation -> text and trained spans: run the chat template, find each message in its output, verify the mask."""
