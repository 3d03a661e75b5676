"""Hide a bar of a MIDI file and let a pretrained model write it anew.

    python recipes/midi/infill.py --model RUN/model --input song.mid --bar 8 --output new.mid [--picture roll.png]
        [--time-signature 4/4] [--temperature 0.7] [--seed 0]

Written is the excerpt around the bar that the model reads, on the grid of its encoding.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmpt.datasets.midi import parsed_signature
from mmpt.encoders.midi import MidiEncoder
from mmpt.encoders.midi_infilling import infill_bar
from mmpt.encoders.midi_notes import read_notes
from mmpt.errors import ConfigError, MmptError
from mmpt.model import MultimodalModel


def main(arguments: list[str] | None = None) -> int:
    """0 on success, 2 after an error that mmpt explains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--input", type=Path, required=True, help="MIDI file")
    parser.add_argument("--bar", type=int, required=True, help="number of the bar, from 0")
    parser.add_argument("--output", type=Path, required=True, help="MIDI file to write")
    parser.add_argument("--picture", type=Path, help="piano roll of the result, .png")
    parser.add_argument("--time-signature", help="of the whole piece, such as 4/4, where the file's own is wrong")
    parser.add_argument("--temperature", type=float, default=0.7, help="below 1 likely notes become likelier")
    parser.add_argument("--seed", type=int, default=0, help="other seeds write other notes")
    options = parser.parse_args(arguments)
    try:
        encoder = MultimodalModel.from_pretrained(options.model).modality("midi").encoder
        if not isinstance(encoder, MidiEncoder):
            raise ConfigError(f"{options.model} has a {type(encoder).__name__} for midi; expected a MidiEncoder")
        notes = read_notes(options.input)
        if options.time_signature:
            notes = notes.with_signature(*parsed_signature(options.time_signature))
        _, context, written = infill_bar(encoder, notes, options.bar, options.temperature, options.seed)
        written.write(options.output)
    except MmptError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if options.picture:
        from rolls import new_notes, piano_roll

        piano_roll(context, new_notes(written, context)).save(options.picture)
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
