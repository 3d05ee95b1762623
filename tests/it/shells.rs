//! Shell completions and the manual, generated from the definitions of the commands.

use std::process::Command;

use temper::methods::registry::REGISTRY;

use crate::support::{done, temper};

#[test]
fn completions_know_every_command_and_its_options() {
    for (shell, learning_rate) in
        [("bash", "--learning-rate"), ("zsh", "--learning-rate"), ("fish", "-l learning-rate")]
    {
        let script = done(&["completions", shell]);
        for entry in REGISTRY {
            assert!(script.contains(entry.name), "{shell}: {}", entry.name);
        }
        for word in [learning_rate, "warmup_stable_decay", "completions", "man", "quickstart"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("temper.bash");
    std::fs::write(&path, done(&["completions", "bash"])).unwrap();
    // What a shell offers behind `temper sft --optim`, where there is one.
    let line = "source \"$0\"; COMP_WORDS=(temper sft --optim mu); COMP_CWORD=3; \
                _temper temper mu --optim; echo \"${COMPREPLY[@]}\"";
    match Command::new("bash").args(["-c", line]).arg(&path).output() {
        Ok(out) => assert_eq!(String::from_utf8_lossy(&out.stdout).trim(), "muon"),
        Err(e) => println!("there is no bash to try it in: {e}"),
    }
    let (code, _, err) = temper(&["completions", "tcsh"]);
    assert!(code == Some(2) && err.contains("bash"), "{err}");
}

#[test]
fn the_manual_has_a_page_of_each_command() {
    let page = done(&["man", "sft"]);
    for word in [".TH", "temper", "learning", "Peak learning rate"] {
        assert!(page.contains(word), "{word}: {}", &page[..300.min(page.len())]);
    }
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("man");
    done(&["man", "--output", folder.to_str().unwrap()]);
    assert!(folder.join("temper.1").is_file());
    for entry in REGISTRY {
        let page =
            std::fs::read_to_string(folder.join(format!("temper-{}.1", entry.name))).unwrap();
        assert!(page.contains(".SH OPTIONS") || page.contains("OPTIONS"), "{}", entry.name);
    }
    let (code, _, err) = temper(&["man", "sfx"]);
    assert!(code == Some(2) && err.contains("did you mean sft?"), "{err}");
}
