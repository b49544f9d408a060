"""The LeRobot side of CRaFT: command line, anchors, training loop. The only room that imports LeRobot."""

import logging


def shorten_codec_warning() -> None:
    """Show LeRobot's warning about a missing video decoder once, and its last line only.

    Every configuration object prints it, with eighty lines of tracebacks of torchcodec, also where no video is read.
    """
    shown: set[str] = set()

    def last_line_once(record: logging.LogRecord) -> bool:
        record.msg = str(record.msg).rstrip().rsplit("\n", 1)[-1]
        is_new = record.msg not in shown
        shown.add(record.msg)
        return is_new

    logging.getLogger("lerobot.utils.import_utils").addFilter(last_line_once)
