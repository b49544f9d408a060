"""The LeRobot side of CRaFT: command line, anchors, training loop. The only room that imports LeRobot."""

import logging


def shorten_codec_warning() -> None:
    """Cut LeRobot's warning about a missing video decoder to its last line.

    Every configuration object prints it, with eighty lines of tracebacks of torchcodec, also where no video is read.
    """

    def last_line(record: logging.LogRecord) -> bool:
        record.msg = str(record.msg).rstrip().rsplit("\n", 1)[-1]
        return True

    logging.getLogger("lerobot.utils.import_utils").addFilter(last_line)
