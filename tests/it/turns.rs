//! Completions of several turns in the engine: they continue in the same cache, and neither waiting
//! nor a full cache changes a bit. The tokens that a chat template writes between two turns.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use temper::autograd::Cx;
use temper::data::chat::{ChatTemplate, RenderOptions};
use temper::data::continuation::Talk;
use temper::data::format::Format;
use temper::data::render::Renderer;
use temper::data::rows::Row;
use temper::data::tokenizer::Tokenizer;
use temper::device::DType;
use temper::model::decoder::Decoder;
use temper::model::layout::ModelConfig;
use temper::ops::case::Rng;
use temper::rollout::sample::Sampling;
use temper::rollout::stop::StopStrings;
use temper::rollout::{Completion, Counts, Engine, EngineOptions, Finish, Request};

use crate::support::{bits, cpu_in, tokenizer_and_template};

/// By prompt and member.
type Finished = BTreeMap<(usize, usize), (Completion, Turns)>;

const VOCAB: usize = 96;
const LONGEST: usize = 200;
const MOST: usize = 70;

fn model(cx: &Cx) -> Decoder {
    let model = Decoder::builder(ModelConfig::llama(VOCAB, 64, 160, 2, 4, 2, 256, true))
        .positions(256)
        .build(cx)
        .unwrap();
    model.params.initialise(0.2, 11).unwrap();
    model
}

fn requests(rng: &mut Rng) -> Vec<Request> {
    let prompts = (0..10).map(|g| {
        let length = [1, 2, 20, 63, 64, 65, 100, 129][g % 8];
        (0..length).map(|_| rng.below(VOCAB) as u32).collect::<Vec<u32>>()
    });
    Request::numbered(prompts.collect::<Vec<_>>(), 3)
}

/// What is put behind a turn: a function of the completion and its turn alone.
fn inserted(request: usize, member: usize, turn: usize) -> Vec<u32> {
    let mut rng = Rng((1 + request * 100 + member * 10 + turn) as u64);
    (0..1 + rng.below(30)).map(|_| rng.below(VOCAB) as u32).collect()
}

/// Which of a completion's tokens are where: its context before each turn, and the turn.
type Turns = Vec<(Vec<u32>, Vec<u32>)>;

/// All completions, each of up to three turns; a turn waits for a random number of steps.
fn talk(
    cx: &mut Cx,
    model: &mut Decoder,
    options: &EngineOptions,
    delays: &mut Rng,
) -> (Finished, Counts) {
    let requests = requests(&mut Rng(17));
    let mut engine = Engine::new(cx, model, options.clone(), LONGEST).unwrap();
    for request in &requests {
        engine.submit(request).unwrap();
    }
    let mut turns: BTreeMap<(usize, usize), Turns> = BTreeMap::new();
    let mut whole: BTreeMap<(usize, usize), (Vec<u32>, usize)> = BTreeMap::new();
    let mut done = BTreeMap::new();
    let mut waiting: Vec<(usize, (usize, usize))> = Vec::new();
    let mut step = 0;
    while engine.has_work() || !waiting.is_empty() {
        step += 1;
        let stepped = engine.step(cx, model).unwrap();
        let ended = stepped.turns.into_iter().map(|t| ((t.request, t.member), t.ids, None));
        let cut = stepped.done.into_iter().map(|c| ((c.request, c.member), c.ids.clone(), Some(c)));
        for (at, ids, completion) in ended.chain(cut).collect::<Vec<_>>() {
            let (tokens, taken) =
                whole.entry(at).or_insert_with(|| (requests[at.0].prompt.clone(), 0));
            turns.entry(at).or_default().push((tokens.clone(), ids[*taken..].to_vec()));
            tokens.extend(&ids[*taken..]);
            *taken = ids.len();
            match completion {
                Some(c) => drop(done.insert(at, c)),
                None => waiting.push((step + delays.below(12), at)),
            }
        }
        for (_, at) in waiting.extract_if(.., |(due, _)| *due <= step).collect::<Vec<_>>() {
            let (request, member) = at;
            let (tokens, taken) = whole.get_mut(&at).unwrap();
            let more = inserted(request, member, turns[&at].len());
            let length = tokens.len() - requests[request].prompt.len();
            if turns[&at].len() == 3 || length + more.len() >= MOST {
                let completion = engine.finish(request, member, Finish::Stop).unwrap();
                assert_eq!(completion.ids.len(), *taken);
                done.insert(at, completion);
            } else {
                engine.resume(request, member, &more).unwrap();
                tokens.extend(more);
            }
        }
    }
    let counts = engine.counts;
    let all = done.into_iter().map(|(at, c)| (at, (c, turns.remove(&at).unwrap()))).collect();
    (all, counts)
}

#[test]
fn a_stop_string_ends_its_own_turn_alone() {
    let mut cx = cpu_in(DType::F32);
    let mut model = model(&cx);
    let tokenizer = std::sync::Arc::new(tokenizer_and_template().0);
    let strings: Vec<String> = ["e", "a", "7", ")"].map(str::to_string).to_vec();
    let mut options = EngineOptions::new(MOST, Sampling::greedy(), Vec::new(), 30);
    options.stop_strings = StopStrings::new(&strings, &tokenizer);
    options.turns = true;
    let (all, _) = talk(&mut cx, &mut model, &options, &mut Rng(1));
    let (mut later, mut longer) = (0, 0);
    for (completion, turns) in all.values() {
        for (i, (_, said)) in turns.iter().enumerate() {
            let text = tokenizer.decode(said, true).unwrap();
            let cut = i + 1 == turns.len() && completion.finish == Finish::Length;
            assert!(cut || strings.iter().any(|s| text.contains(s)), "turn {i}: {text:?}");
            later += usize::from(i > 0);
            longer += usize::from(i > 0 && said.len() > 1);
        }
    }
    assert!(later > 5 && longer > 0, "{later} turns behind another, {longer} of several tokens");
}

/// Each turn equals the completion of a fresh prompt of all that stood before it.
fn equals_fresh_prompts(dtype: DType) {
    let mut cx = cpu_in(dtype);
    let mut model = model(&cx);
    let stop: Vec<u32> = (0..VOCAB as u32).step_by(17).collect();
    let mut options = EngineOptions::new(MOST, Sampling::greedy(), stop, 30);
    options.turns = true;
    let (all, counts) = talk(&mut cx, &mut model, &options, &mut Rng(1));
    assert_eq!((all.len(), counts.preempted), (30, 0));
    let (mut several, mut cut) = (0, 0);
    let mut fresh =
        Engine::new(&cx, &mut model, EngineOptions { turns: false, ..options }, LONGEST).unwrap();
    for (completion, turns) in all.values() {
        let mut at = 0;
        for (context, said) in turns {
            let room = LONGEST - context.len();
            fresh.options.max_new_tokens = said.len().min(room);
            let request = Request { prompt: context.clone(), n: 1, number: 0 };
            let want = fresh.generate(&mut cx, &model, &[request]).unwrap().remove(0);
            assert_eq!(&want.ids, said);
            let own = &completion.logps_scaled[at..at + said.len()];
            assert_eq!(bits(own), bits(&want.logps_scaled));
            at += said.len();
        }
        assert_eq!(at, completion.ids.len());
        several += usize::from(turns.len() > 1);
        cut += usize::from(completion.finish == Finish::Length);
    }
    assert!(several > 10 && cut > 0, "{several} of several turns, {cut} cut off");
}

#[test]
fn a_turn_has_the_bits_of_a_fresh_prompt_of_all_before_it() {
    equals_fresh_prompts(DType::F32);
    equals_fresh_prompts(DType::BF16);
}

#[test]
fn neither_waiting_nor_a_full_cache_changes_a_turn() {
    let mut cx = cpu_in(DType::F32);
    let mut model = model(&cx);
    let stop: Vec<u32> = (0..VOCAB as u32).step_by(9).collect();
    for penalty in [1.0, 1.3] {
        let sampling = Sampling {
            temperature: 0.9,
            repetition_penalty: penalty,
            seed: 5,
            ..Sampling::greedy()
        };
        let mut options = EngineOptions::new(MOST, sampling, stop.clone(), 30);
        options.turns = true;
        let (want, _) = talk(&mut cx, &mut model, &options, &mut Rng(2));
        let mut rng = Rng(3);
        let mut preempted = 0;
        for (replay, ahead) in [(false, false), (false, true), (true, false), (true, true)] {
            options.max_sequences = 4 + rng.below(20);
            options.max_step_tokens = options.max_sequences + rng.below(200);
            options.pages = Some(4 + rng.below(14));
            (options.replay, options.ahead) = (Some(replay), Some(ahead));
            let (found, counts) = talk(&mut cx, &mut model, &options, &mut rng);
            assert!(found == want, "replay {replay}, ahead {ahead}, penalty {penalty}");
            preempted += counts.preempted;
        }
        assert!(preempted > 0, "the case was to have preemptions");
    }
}

#[test]
fn what_is_forgotten_between_two_turns_leaves_no_trace() {
    let mut cx = cpu_in(DType::F32);
    let mut model = model(&cx);
    let stop: Vec<u32> = (0..VOCAB as u32).collect();
    let mut options = EngineOptions::new(8, Sampling::greedy(), stop, 4);
    (options.turns, options.pages) = (true, Some(5));
    let mut engine = Engine::new(&cx, &mut model, options, 20).unwrap();
    for _ in 0..5 {
        for number in 0..4 {
            engine.submit(&Request { prompt: vec![7, 3], n: 1, number }).unwrap();
        }
        let turns = engine.step(&mut cx, &model).unwrap().turns;
        assert_eq!(turns.len(), 4, "each token ends a turn");
        assert!(!engine.has_work());
        engine.resume(0, 0, &[1, 2]).unwrap();
        assert!(engine.resume(0, 0, &[1]).unwrap_err().to_string().contains("does not wait"));
        let error = engine.resume(1, 0, &[1; 7]).unwrap_err().to_string();
        assert!(error.contains("7 tokens after a turn"), "{error}");
        engine.cancel(2);
        assert!(engine.finish(2, 0, Finish::Stop).is_err());
        engine.abort();
        assert!(engine.finish(3, 0, Finish::Stop).is_err());
    }
}

fn row(prompt: Value) -> Row {
    let mut value = serde_json::Map::new();
    value.insert("prompt".into(), prompt);
    Row { value, file: std::path::Path::new("rows.jsonl").into(), line: 7 }
}

/// The continuation after `said` and `reply`.
fn continuation(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    said: &str,
    stop: u32,
    reply: &Value,
) -> temper::Result<Vec<u32>> {
    let mut messages = vec![json!({ "role": "user", "content": "How many?" })];
    let row = row(Value::Array(messages.clone()));
    messages.push(json!({ "role": "assistant", "content": said }));
    let example = Format::PromptOnly.parse(&row, "").unwrap();
    let renderer = Renderer::new(tokenizer, Some(template), 320);
    let talk = Talk { renderer, row: &row, example: &example, messages: &messages, stop };
    talk.continuation(reply.as_array().unwrap())
}

#[test]
fn turn_and_continuation_are_the_tokens_of_the_whole_conversation() {
    let (tokenizer, template) = tokenizer_and_template();
    let stop = tokenizer.token_to_id("<|im_end|>").unwrap();
    for (said, reply) in [
        ("5 + 3 =", json!([{ "role": "user", "content": "8" }])),
        (
            " two  spaces ",
            json!([{ "role": "tool", "content": "a" }, { "role": "user", "content": "🙂" }]),
        ),
        ("", json!([{ "role": "user", "content": "" }])),
    ] {
        let user = json!({ "role": "user", "content": "How many?" });
        let all = [
            &[user.clone(), json!({ "role": "assistant", "content": said })][..],
            reply.as_array().unwrap(),
        ]
        .concat();
        let prompts = RenderOptions { add_generation_prompt: true, ..Default::default() };
        let render = |messages: Value| template.render(&messages, prompts).unwrap().text;
        let whole = tokenizer.encode(&render(Value::Array(all)), false).unwrap();
        let mut ids = tokenizer.encode(&render(json!([user])), false).unwrap();
        ids.extend(tokenizer.encode(said, false).unwrap());
        ids.push(stop);
        ids.extend(continuation(&tokenizer, &template, said, stop, &reply).unwrap());
        assert_eq!(ids, whole, "{said:?}");
    }
    // Another end token than the template's: the template's is written after it.
    let reply = json!([{ "role": "user", "content": "8" }]);
    let usual = continuation(&tokenizer, &template, "5", stop, &reply).unwrap();
    let other = continuation(&tokenizer, &template, "5", 0, &reply).unwrap();
    assert_eq!(other, [&[stop][..], &usual].concat());
    // One that the text of the template's begins with.
    let less = tokenizer.token_to_id("<").unwrap();
    let other = continuation(&tokenizer, &template, "5<", less, &reply).unwrap();
    assert_eq!(other, [&[stop][..], &usual].concat());
}

#[test]
fn a_template_that_writes_earlier_turns_otherwise_is_refused_with_the_turn() {
    let (tokenizer, _) = tokenizer_and_template();
    // As Qwen3: the reasoning of turns before the last question of the user is dropped.
    let source = "{%- set ns = namespace(last=0) -%}\
        {%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}\
        {%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' -}}\
        {%- if m.role == 'assistant' and loop.index0 < ns.last -%}{{- m.content.split('</think>')[-1] -}}\
        {%- else -%}{{- m.content -}}{%- endif -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}\
        {%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}";
    let file = std::path::Path::new("template.jinja");
    let template = ChatTemplate::new(source, file, tokenizer.special_tokens()).unwrap();
    let stop = tokenizer.token_to_id("<|im_end|>").unwrap();
    let (said, user) = ("<think>3</think>5", json!([{ "role": "user", "content": "8" }]));
    let error = continuation(&tokenizer, &template, said, stop, &user).unwrap_err().to_string();
    for part in ["rows.jsonl:7", "messages[1]", "<think>3</think>5", "role \"tool\""] {
        assert!(error.contains(part), "{part} is not in: {error}");
    }
    let tool = json!([{ "role": "tool", "content": "8" }]);
    continuation(&tokenizer, &template, said, stop, &tool).unwrap();
    // Without reasoning nothing is dropped.
    continuation(&tokenizer, &template, "5", stop, &user).unwrap();
    // An end token that is no token of a text.
    let error = continuation(&tokenizer, &template, "5", 150, &user).unwrap_err().to_string();
    assert!(error.contains("does not encode to one token"), "{error}");
}
