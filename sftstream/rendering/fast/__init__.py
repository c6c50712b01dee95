"""The fast path: trace a template for each shape of conversation, then fill in the values.

The words of this package; `symbolic.py`, `shape.py` and `render_plan.py` have an example each:

    value    a text of a conversation, a tool definition, or the arguments of a call: "hi"
    shape    everything else in a conversation that can change the printed text or the trained
             spans: roles, train flags, present fields, blank texts
    trace    one run of the template with symbolic objects instead of values; it records what the
             template prints, and what the template asks about the values
    guard    a question that the template asks about a value, with the answer: "value 0 contains
             'x': yes"
    piece    a stretch of printed text: either the template's own text, or a printed value
    plan     the pieces of a trace with the trained spans; the plan prints other conversations of
             the same shape whose values fulfil all guards: the answers are the same
    markup   texts that the search for turns looks for: special tokens, role marker, stops, `<think`

Only `RenderCache` is used outside of this package.
"""
