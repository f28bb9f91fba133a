"""Lines of a stream, wherever it is cut into pieces."""

from pipeline.lines import lines


def test_only_a_line_feed_ends_a_line() -> None:
    sent = 'data: {"a": "\u2028\u0085 é"}\n\ndata: [DONE]\n'.encode()
    whole = [b'data: {"a": "\xe2\x80\xa8\xc2\x85 \xc3\xa9"}', b"", b"data: [DONE]"]
    for cut in range(len(sent)):
        assert list(lines((sent[:cut], sent[cut:]))) == whole
    assert list(lines([b"a\nb"])) == [b"a", b"b"]
