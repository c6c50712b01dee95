"""Text and trained spans -> Example: token ids, and a loss mask aligned with the spans.

The words of this package, on the text "hi</s>" with the tokens "h", "i", "</s>":

    span          a trained range of the text, in characters: [0, 6)
    bounds        starts and ends of all spans in turn: [0, 6]
    loss mask     for each token, True if the token is trained: [True, True, True]
    inside        a token is inside a span if all bytes of the token lie in the span, as here
    straddling    a token is straddling if only some of its bytes lie in a span: "</s>" for the span
                  [0, 3); a straddling token is not trained
    byte-level    a tokenizer is byte-level if the tokens of a text together hold exactly the bytes
                  of the text (GPT-2, Llama 3, Qwen)
    added token   token that the tokenizer matches as a whole before all other tokens: "</s>"
    special token added token with the attribute `special`: "</s>"
    typed         text of a special token that a person typed in a message; tokenized as words
    backend       library that computes token ids: `tokenizers` (Hugging Face) or `fastokens`
"""
