//! Rows with `messages`, by the chat template of the model folder.

use std::{fs, path::Path};

use serde_json::{Value, json};

use super::{fails, lines, ok, scratch, str};

const WORDS: [&str; 7] = ["</s>", "<|start|>", "<|end|>", "user", "assistant", "hi", "yes"];

/// The small Llama with a tokenizer of a few words and a template. Ids are places in `WORDS`.
pub(super) fn base(dir: &Path) -> std::path::PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/parity/llama/base");
    let base = dir.join("base");
    fs::create_dir_all(&base).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(from.join(file), base.join(file)).unwrap();
    }
    let vocabulary: serde_json::Map<String, Value> =
        WORDS.iter().zip(0..).map(|(word, id)| (word.to_string(), json!(id))).collect();
    let special = |id: usize| {
        json!({"id": id, "content": WORDS[id], "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [special(0), special(1), special(2)],
        "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "</s>"},
    });
    fs::write(base.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(base.join("tokenizer_config.json"), r#"{"eos_token": "<|end|>"}"#).unwrap();
    let template = "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}";
    fs::write(base.join("chat_template.jinja"), template).unwrap();
    base
}

pub(super) fn written(dir: &Path, name: &str, rows: &[Value]) -> std::path::PathBuf {
    let path = dir.join(name);
    fs::write(&path, rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
    path
}

#[test]
fn conversations_are_what_their_ids_are() {
    let dir = scratch("chat");
    let base = base(&dir);
    let user = |content: &str| json!({"role": "user", "content": content});
    let assistant = |content: &str| json!({"role": "assistant", "content": content});
    let chats = [
        json!({"messages": [user("hi"), assistant("yes yes")]}),
        json!({"messages": [user("hi"), assistant("yes"), user("yes hi"), assistant("hi")]}),
    ];
    let ids = [
        json!({"input_ids": [1, 3, 5, 2, 1, 4], "label_ids": [6, 6, 2]}),
        json!({"input_ids": [1, 3, 5, 2, 1, 4, 6, 2, 1, 3, 6, 5, 2, 1, 4], "label_ids": [5, 2]}),
    ];
    let (chats_file, ids_file) =
        (written(&dir, "chat.jsonl", &chats), written(&dir, "ids.jsonl", &ids));
    let evaluated = |data: &Path| {
        let out = dir.join("nll.jsonl");
        let flags = ["eval", "--model", str(&base), "--data", str(data), "--generate", "off"];
        ok(&[&flags[..], &["--per-example", str(&out), "--overwrite"]].concat());
        lines(&out).iter().map(|row| row["nll"].as_f64().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(evaluated(&chats_file), evaluated(&ids_file));

    // An answer is generated for the last word of the user's, whether the row has the assistant's or not.
    let open = json!({"messages": [user("hi")], "note": "kept"});
    let generated = |data: &Path| {
        let out = dir.join("out.jsonl");
        let flags = ["generate", "--model", str(&base), "--data", str(data), "--output", str(&out)];
        ok(&[&flags[..], &["--max-new-tokens", "4", "--overwrite"]].concat());
        lines(&out)
    };
    let answers = generated(&written(&dir, "open.jsonl", &[open.clone(), chats[0].clone()]));
    assert_eq!(answers[0]["note"], "kept");
    assert_eq!(answers[0]["output_ids"], answers[1]["output_ids"]);
    assert_eq!(answers[0]["output_ids"], generated(&ids_file)[0]["output_ids"]);

    let refused = |rows: &[Value], reason: &str| {
        let data = written(&dir, "bad.jsonl", rows);
        fails(&["eval", "--model", str(&base), "--data", str(&data)], 3, reason);
    };
    refused(
        &[chats[0].clone(), open],
        "bad.jsonl:2: field messages: the last one must be the assistant's",
    );
    refused(&[json!({"messages": [assistant("hi")]})], "bad.jsonl:1: the input is empty");
    refused(
        &[json!({"messages": [{"content": "hi"}]})],
        "field messages[0]: expected an object with role",
    );
    refused(&[json!({"messages": [user("hi")], "input": "hi"})], "has both messages and input");
    fs::write(base.join("chat_template.jinja"), "{{ raise_exception('system first') }}").unwrap();
    refused(&chats, "chat_template.jinja: line 1: system first");
    fs::remove_file(base.join("chat_template.jinja")).unwrap();
    refused(&chats, "bad.jsonl:1: the row has messages, but the model folder has no chat template");
}

/// A prompt that leaves no position for a token is refused by its line, before anything is written.
#[test]
fn prompts_longer_than_the_positions_are_refused() {
    let dir = scratch("positions");
    let base = base(&dir);
    let long: Vec<usize> = (0..65).map(|i| i % 5 + 1).collect();
    let rows = [json!({"input_ids": [1, 3]}), json!({"input_ids": long})];
    let (data, out) = (written(&dir, "rows.jsonl", &rows), dir.join("out.jsonl"));
    let flags = ["generate", "--model", str(&base), "--data", str(&data), "--output", str(&out)];
    fails(&flags, 3, "rows.jsonl:2: the row has 65 tokens, but the model has positions for 64");
    assert!(!out.exists());
}
