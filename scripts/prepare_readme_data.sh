#!/usr/bin/env bash
# The corpus (the Python standard library's sources), its SentencePiece tokenizer and its .bin/.idx files, made once.
#     scripts/prepare_readme_data.sh [FOLDER]        default: data/stdlib. Needs the environment's python in the PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-data/stdlib}
index=$folder/stdlib_text_document.idx

python tools/prepare_stdlib_corpus.py --output-dir "$folder"
if [ "$index" -nt "$folder/stdlib.jsonl" ] && [ "$index" -nt "$folder/tokenizer.model" ]; then
    echo "$index is up to date"
else
    python tools/preprocess_data.py --input "$folder/stdlib.jsonl" --output-prefix "$folder/stdlib" --append-eod \
        --tokenizer-type GPTSentencePieceTokenizer --tokenizer-model "$folder/tokenizer.model"
fi
