//! The overview of `temper --help`, and an example for each command. Layer 9.
//!
//! Invariant: every command is in one group; a command without a group is in the last one, so a new
//! method needs no line here.

use std::fmt::Write;

/// Commands by purpose, in the order of the overview.
const GROUPS: &[(&str, &[&str])] = &[
    ("Start", &["quickstart"]),
    ("Train on texts and answers", &["sft", "pretrain", "distill"]),
    ("Train on preferences", &["dpo", "kto", "orpo", "cpo", "reward", "prm"]),
    (
        "Train on the model's own completions",
        &["grpo", "rloo", "reinforce", "ppo", "online-dpo", "gkd", "on-policy-distill"],
    ),
    ("Use a model", &["generate", "chat", "serve", "score", "merge", "convert", "export"]),
    ("Look at data, models and runs", &["data", "eval", "inspect", "report"]),
    ("Check and measure", &["check", "bench"]),
    ("Shell", &["completions", "man"]),
    ("More", &[]),
];

/// Examples below the options of `temper COMMAND --help`.
const EXAMPLES: &[(&str, &str)] = &[
    ("quickstart", "temper quickstart --output quickstart"),
    (
        "sft",
        "temper sft --model DIR --data rows.jsonl --output OUT learning_rate=2e-5 max_length=2048\n  \
         temper sft --model DIR --data rows.jsonl --output OUT use_peft=true load_in_4bit=true\n  \
         temper sft --model DIR --data rows.jsonl --output OUT --resume",
    ),
    ("pretrain", "temper pretrain --model DIR --data texts/ --output OUT max_length=1024"),
    (
        "distill",
        "temper distill --model DIR --data rows.jsonl --output OUT teacher_model_name_or_path=TEACHER",
    ),
    ("dpo", "temper dpo --model DIR --data pairs.jsonl --output OUT beta=0.1 use_peft=true"),
    ("kto", "temper kto --model DIR --data labelled.jsonl --output OUT"),
    ("orpo", "temper orpo --model DIR --data pairs.jsonl --output OUT"),
    ("cpo", "temper cpo --model DIR --data pairs.jsonl --output OUT loss_type=simpo"),
    ("reward", "temper reward --model DIR --data pairs.jsonl --output OUT"),
    ("prm", "temper prm --model DIR --data steps.jsonl --output OUT"),
    (
        "grpo",
        "temper grpo --model DIR --data prompts.jsonl --output OUT reward_funcs=numeric_match \
         num_generations=8",
    ),
    (
        "rloo",
        "temper rloo --model DIR --data prompts.jsonl --output OUT reward_funcs=numeric_match",
    ),
    (
        "reinforce",
        "temper reinforce --model DIR --data prompts.jsonl --output OUT reward_funcs=numeric_match",
    ),
    ("ppo", "temper ppo --model DIR --data prompts.jsonl --output OUT reward_model=REWARD_DIR"),
    (
        "online-dpo",
        "temper online-dpo --model DIR --data prompts.jsonl --output OUT \
         reward_model=REWARD_DIR",
    ),
    (
        "gkd",
        "temper gkd --model DIR --data rows.jsonl --output OUT teacher_model_name_or_path=TEACHER",
    ),
    (
        "on-policy-distill",
        "temper on-policy-distill --model DIR --data prompts.jsonl --output OUT \
         teacher_model_name_or_path=TEACHER",
    ),
    (
        "generate",
        "temper generate --model DIR --chat --prompt 'What is 17 + 25?' max_new_tokens=64\n  \
         temper generate --model DIR --data prompts.jsonl --output completions.jsonl temperature=0",
    ),
    ("chat", "temper chat --model DIR --adapter OUT temperature=0.7"),
    (
        "serve",
        "temper serve DIR --port 8000\n  temper serve DIR --adapter sums=OUT --api-key SECRET",
    ),
    ("score", "temper score --model DIR --data rows.jsonl --output scores.jsonl"),
    ("merge", "temper merge --model DIR --adapter OUT --output MERGED"),
    ("convert", "temper convert FILE.gguf DIR"),
    ("export", "temper export --gguf DIR FILE.gguf --type q8_0"),
    ("data", "temper data --model DIR --data rows.jsonl --rows 2 assistant_only_loss=true"),
    ("eval", "temper eval --model DIR --data questions.jsonl reward_funcs=numeric_match n=4"),
    (
        "inspect",
        "temper inspect config --model DIR\n  \
         temper inspect memory --model DIR max_length=2048 per_device_train_batch_size=4",
    ),
    ("report", "temper report OUT"),
    ("completions", "temper completions bash > temper.bash"),
    ("man", "temper man sft > temper-sft.1\n  temper man --output man1"),
    ("check", "temper check --device cuda\n  temper check --device cpu --op attention"),
    (
        "bench",
        "temper bench train --shape qwen2.5-0.5b --batch 8 --length 2048\n  \
         temper bench decode --shape qwen2.5-0.5b --batch 256",
    ),
];

/// Adds the overview to `temper` and an example to each command.
pub fn add(temper: clap::Command) -> clap::Command {
    let overview = overview(&temper);
    let names: Vec<String> =
        temper.get_subcommands().map(|command| command.get_name().to_string()).collect();
    let with_examples = names.into_iter().fold(temper, |temper, name| {
        let example = EXAMPLES.iter().find(|(of, _)| *of == name).map(|(_, text)| *text);
        temper.mut_subcommand(name, |command| match example {
            Some(text) => command.after_help(format!("Example:\n  {text}")),
            None => command,
        })
    });
    let rest = "Options:\n{options}\n\n\
                temper COMMAND --help shows a command; temper COMMAND --help-options lists the \
                options of a training command.";
    with_examples
        .help_template(format!("{{about}}\n\n{{usage-heading}} {{usage}}\n\n{overview}{rest}"))
}

/// The commands of each group with their descriptions.
fn overview(temper: &clap::Command) -> String {
    let grouped = |name: &str| GROUPS.iter().any(|(_, names)| names.contains(&name));
    let commands: Vec<(&str, String)> = temper
        .get_subcommands()
        .map(|c| (c.get_name(), c.get_about().map(ToString::to_string).unwrap_or_default()))
        .collect();
    let width = commands.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    let mut text = String::new();
    for (group, names) in GROUPS {
        let named = names.iter().filter_map(|n| commands.iter().find(|(name, _)| name == n));
        let others = commands.iter().filter(|(name, _)| names.is_empty() && !grouped(name));
        let mut lines = named.chain(others).peekable();
        if lines.peek().is_none() {
            continue;
        }
        let _ = writeln!(text, "{group}:");
        for (name, about) in lines {
            let _ = writeln!(text, "  {name:width$}  {about}");
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::Parsed;
    use super::*;

    /// The words of a shell line without quotes inside words.
    fn words(line: &str) -> Vec<String> {
        let mut parts = Vec::new();
        for (i, part) in line.split('\'').enumerate() {
            match i % 2 {
                0 => parts.extend(part.split_whitespace().map(String::from)),
                _ => parts.push(part.into()),
            }
        }
        parts
    }

    #[test]
    fn every_example_is_a_command_line_that_parses() {
        for (name, text) in EXAMPLES {
            for line in text.lines() {
                let mut words = words(line);
                words.truncate(words.iter().position(|w| w == ">").unwrap_or(words.len()));
                assert_eq!(words[..2], ["temper", name], "{line}");
                let given = words.iter().map(Into::into).collect();
                match super::super::parse(given) {
                    Ok(Parsed::Train(entry, args)) => {
                        (entry.run)().read(None, &args.keys, 0).unwrap();
                    }
                    Ok(Parsed::Other(_)) => {}
                    Err(e) => panic!("{line}: {e}"),
                }
            }
        }
    }

    #[test]
    fn the_overview_names_every_command_once() {
        let temper = super::super::command();
        let overview = overview(&temper);
        for command in temper.get_subcommands() {
            let name = command.get_name();
            let lines = overview.lines().filter(|l| l.split_whitespace().next() == Some(name));
            assert_eq!(lines.count(), 1, "{name}\n{overview}");
            assert!(EXAMPLES.iter().any(|(of, _)| *of == name), "{name} has no example");
        }
    }
}
