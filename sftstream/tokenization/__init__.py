"""Text and trained spans -> Example: token ids, and a loss mask aligned with the spans.

The words of this package, on the text "hi</s>" with the tokens "h", "i", "</s>":

    span          a trained range of the text, in characters: [0, 6)
    bounds        starts and ends of all spans in turn: [0, 6]
    loss mask     for each token, True if the token is trained: [True, True, True]
    inside        said of a token whose bytes all lie in one span
    straddling    said of a token that lies partly inside a span and partly outside; never trained
    byte-level    said of a tokenizer that encodes bytes (GPT-2, Llama 3, Qwen), so that the tokens
                  of a text together hold exactly the bytes of the text
    added token   a token that the tokenizer matches as a whole before all other tokens: "</s>"
    special token an added token with the mark `special`, for example "</s>"
    typed         said of a special token's text inside a message, which is tokenized as plain words
    backend       the library that computes token ids: `tokenizers` (Hugging Face) or `fastokens`
"""
