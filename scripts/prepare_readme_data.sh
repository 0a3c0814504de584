#!/usr/bin/env bash
# The corpus (the Python standard library's sources), its tokenizers and the .bin/.idx files of one model, made once.
#     scripts/prepare_readme_data.sh [FOLDER [MODEL]]        default: data/stdlib, and gpt (or $MODEL)
# MODEL: gpt    SentencePiece, whole documents               FOLDER/stdlib_text_document
#        bert   WordPiece, a sequence per line of code       FOLDER/stdlib_bert_text_sentence
#        t5     SentencePiece, a sequence per line of code   FOLDER/stdlib_t5_text_sentence
#        swin   5,000 handwritten digits                     FOLDER/train-images-idx3-ubyte.gz and so on
# Needs the environment's python in the PATH. PREPARE_FLAGS: further flags of tools/prepare_stdlib_corpus.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-data/stdlib}
model=${2:-${MODEL:-gpt}}

# Program code has no sentences to speak of: a sentence is a line here.
case $model in
swin)
    exec python tools/prepare_images.py --output-dir "$folder"
    ;;
gpt)
    prefix=$folder/stdlib
    index=${prefix}_text_document.idx
    tokenizer=$folder/tokenizer.model
    flags=(--append-eod --tokenizer-type GPTSentencePieceTokenizer --tokenizer-model "$tokenizer")
    ;;
bert)
    prefix=$folder/stdlib_bert
    index=${prefix}_text_sentence.idx
    tokenizer=$folder/vocab.txt
    flags=(--split-sentences --sentence-unit line --tokenizer-type BertWordPieceCase --vocab-file "$tokenizer")
    ;;
t5)
    prefix=$folder/stdlib_t5
    index=${prefix}_text_sentence.idx
    tokenizer=$folder/tokenizer.model
    flags=(--split-sentences --sentence-unit line --keep-newlines
        --tokenizer-type SentencePieceTokenizer --tokenizer-model "$tokenizer")
    ;;
*)
    echo "MODEL ($model) must be gpt, bert, t5 or swin" >&2
    exit 1
    ;;
esac

# shellcheck disable=SC2086  # PREPARE_FLAGS is several words
python tools/prepare_stdlib_corpus.py --output-dir "$folder" ${PREPARE_FLAGS:-}
if [ "$index" -nt "$folder/stdlib.jsonl" ] && [ "$index" -nt "$tokenizer" ]; then
    echo "$index is up to date"
else
    python tools/preprocess_data.py --input "$folder/stdlib.jsonl" --output-prefix "$prefix" "${flags[@]}"
fi
