"""Tables align text on the left and numbers on the right."""

from lightvlm.evaluation.markdown import markdown_table


def test_a_line_for_heads_alignment_and_each_row():
    rows = [["a", "b", "1", "2"], ["c", "", "3", "4"]]
    assert markdown_table(["x", "y", "n", "m"], rows, text_columns=2).splitlines() == [
        "| x | y | n | m |",
        "| --- | --- | ---: | ---: |",
        "| a | b | 1 | 2 |",
        "| c |  | 3 | 4 |",
    ]
    assert markdown_table(["x", "n"], []).splitlines()[1] == "| --- | ---: |"
