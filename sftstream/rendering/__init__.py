"""Render a conversation as text with the chat template, and find the trained spans of the text.

The words of this package, on a conversation of a user's "hi" and an assistant's "seven":

    <|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\nseven<|im_end|>\\n

    payload            text of the conversation itself, not of the template: "hi", "seven"
    kind               the place of a payload in its message: "content", "reasoning", or "call" for
                       the name and the arguments of a tool call
    header             template text that opens a message: "<|im_start|>user\\n"
    gap                template text between two payloads: "<|im_end|>\\n<|im_start|>assistant\\n"
    tail               text after the last payload of a render: "<|im_end|>\\n"
    generation prompt  text that the template adds for inference; the model speaks after it:
                       "<|im_start|>assistant\\n"
    role marker        the longest beginning of the generation prompt that the template also prints
                       before every answer; here the whole prompt
    stop               text that ends an assistant's turn: "<|im_end|>"
    turn               text of one assistant message, from the end of the generation prompt to the
                       end of the stop: "seven<|im_end|>"
    special token      token that the tokenizer lists as special: "<|im_start|>", "<|im_end|>"
    tag                a word in angle or square brackets, special or not: "<think>", "[INST]"
    thought            reasoning inside the content: "<think>hm</think>" of "<think>hm</think>seven"
    marker             unique word put before or after a payload to find the payload again:
                       "ZqM1bZq" before "seven" (`markers.py`)
    shape              everything in a conversation except the words: number and roles of messages,
                       present fields, tool calls
    probe              a short conversation, rendered once at the start of a run to learn how the
                       template prints
    evidence           printed text that proves the start or end of a turn, often in a second
                       render; without evidence, the conversation is refused

The argument `control` of many functions is a pattern that matches the text of any special token.
"""
