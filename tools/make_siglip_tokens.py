"""Make the committed table of SigLIP token ids from its publisher's tokenizer file.

    python tools/make_siglip_tokens.py spiece.model > mfuser_d2/core/encoders/siglip_tokens.json

The file is spiece.model or tokenizer.json of any English SigLIP (version 1); sentencepiece or tokenizers reads it.
"""

import argparse
import json

from mfuser_d2.core.encoders.class_tokens import siglip_ids
from mfuser_d2.data.labels import CLASSES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="spiece.model or tokenizer.json")
    parser.add_argument("names", nargs="*", default=list(CLASSES), help="class names (default: the 19 of Cityscapes)")
    args = parser.parse_args()
    rows = [f"    {json.dumps(name)}: {ids}" for name, ids in zip(args.names, siglip_ids(args.names, args.file))]
    origin = "SigLIP version 1, English, 32,000 pieces; made by tools/make_siglip_tokens.py"
    print(f'{{\n  "vocabulary": "{origin}",\n  "ids": {{\n' + ",\n".join(rows) + "\n  }\n}")


if __name__ == "__main__":
    main()
