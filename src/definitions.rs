//! What the operator defines in `CONFIG_FILE` (docs/definitions.schema.json): names for ids or templates with what their values
//! mean, and custom resources. A file is read whole before it counts; a bad one leaves the last good one in force.

use crate::prelude::*;
use crate::{config::duration, discovery::etag, promql, route::is_metric_id, route::is_name, selector};
use serde::{Deserialize, Deserializer, de::Error as _};
use std::{num::NonZeroU64, sync::LazyLock};

/// What begins no call in a template: it moves the window, makes a value of nothing, or mixes the objects of one query.
const UNFIT: &str = "offset info vector time scalar absent absent_over_time minute hour day_of_week day_of_month day_of_year \
    days_in_month month year sum avg min max count count_values group stddev stdvar topk bottomk quantile limitk limit_ratio";

/// Reads text for serde, whose errors tell line and column.
macro_rules! texts {
    ($($name:ident: $kind:ty = $read:expr, $right:literal;)+) => {
        $(pub(crate) fn $name<'de, D: Deserializer<'de>>(from: D) -> Result<$kind, D::Error> {
            let (text, read): (_, fn(&str) -> Option<$kind>) = (String::deserialize(from)?, $read);
            read(&text).ok_or_else(|| D::Error::custom(format!("{} must be {}", quoted(&text), $right)))
        })+
    };
}

texts! {
    name: String = |it| is_metric_id(it).then(|| it.to_owned()), "letters, digits, _ . : - only";
    metric: String = |it| if is_metric_id(it) { Some(it.to_owned()) } else { template(it) },
        "an id, or PromQL that groups by (…, $by) in each aggregation and has all samples from name{$matchers…}[$window] (docs/definitions.md, Queries)";
    selector: Vec<Requirement> = |it| selector::parse(it).ok(), "a selector as an HPA's, settings included";
    scope: Option<&'static Resource> = |it|
        [("workload", None), ("namespace", Some(&Resource::NAMESPACES)), ("cluster", Some(&Resource::CLUSTER))]
            .into_iter().find(|(name, _)| *name == it).map(|(_, scope)| scope), "workload, namespace or cluster";
    absence: (u64, bool) = |it| it.strip_prefix("hold ").and_then(seconds).map(|time| (time, false))
        .or_else(|| ["error", "zero"].contains(&it).then_some((0, it == "zero"))), "error, zero, or hold 10s to hold 24h";
    age: u64 = seconds, "10s to 24h";
    plural: &'static str = |it| (is_name(it, 63) && !it.contains('.')).then(|| kept(it)), "lower-case letters, digits, - only";
    word: &'static str = |it| (is_metric_id(&it.replacen('/', ":", 1)) && !it.contains("..")).then(|| kept(it)), "letters, digits, - . / _ only";
}

#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Definition {
    #[serde(deserialize_with = "name")]
    pub name: String,
    /// A Sysdig id, a name in PromQL, or a template.
    #[serde(deserialize_with = "metric")]
    pub metric: String,
    #[serde(default, deserialize_with = "selector")]
    pub selector: Vec<Requirement>,
    /// Whose samples count; None for the object's that is asked about.
    #[serde(default, deserialize_with = "scope")]
    pub scope: Option<&'static Resource>,
    pub divide_by: Option<NonZeroU64>,
    pub decimals: Option<u32>,
    /// For how many seconds the last value stands in for a missing one; whether silence is zero.
    #[serde(default, deserialize_with = "absence")]
    pub absence: (u64, bool),
    /// In seconds; 0 for `MAX_AGE`.
    #[serde(default, deserialize_with = "age")]
    pub max_age: u64,
    pub description: Option<String>,
}

#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct File {
    #[serde(skip)]
    pub hash: String,
    pub metrics: Vec<Definition>,
    pub resources: Vec<Resource>,
}

static NONE: LazyLock<(File, Definition)> = LazyLock::new(Default::default);

/// The file in force, which stays for who still holds it when the next one comes, and what is wrong with the newest.
#[derive(Debug, Default)]
pub struct Definitions(pub(crate) Mutex<(Option<&'static File>, Option<String>)>);

impl Definitions {
    /// Takes over the content of the file. Returns its hash. Errors: what is wrong with it; nothing else changes then.
    pub fn load(&self, content: Result<Vec<u8>, String>) -> Result<&'static str, String> {
        let found = content.and_then(|bytes| parse(&bytes));
        let (in_force, mistake) = &mut *lock(&self.0);
        *mistake = found.as_ref().err().cloned();
        Ok(&in_force.insert(forever(found?)).hash)
    }

    pub(crate) fn in_force(&self) -> &'static File {
        lock(&self.0).0.unwrap_or(&NONE.0)
    }

    /// The definition of that name, or one that says nothing. Errors: there never was a good file, so it cannot be told.
    pub(crate) fn find(&self, name: &str) -> Result<&'static Definition> {
        if let (None, Some(mistake)) = &*lock(&self.0) {
            return Err(refusal!(NotConfigured, "CONFIG_FILE is not usable: {mistake}"));
        }
        Ok(self.in_force().metrics.iter().find(|it| it.name == name).unwrap_or(&NONE.1))
    }
}

/// The content of a file. Errors: the first mistake, with its place or its name.
pub fn parse(bytes: &[u8]) -> Result<File, String> {
    let file: File = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let mut taken: BTreeSet<_> = promql::OWN.lines().flat_map(|line| line.split(' ').take(2)).map(str::to_owned).collect();
    let resources = Resource::KNOWN.into_iter().chain(&file.resources).map(Resource::qualified);
    let twice = resources.chain(file.metrics.iter().map(|it| it.name.clone())).find(|name| !taken.insert(name.clone()));
    let hash = etag(bytes).replace('"', "");
    twice.map_or(Ok(File { hash, ..file }), |name| Err(format!("{} is the name of something else already", quoted(&name))))
}

fn seconds(text: &str) -> Option<u64> {
    duration(text).map(|it| it.as_secs()).filter(|it| (10..=86_400).contains(it))
}

/// What stays, each word once, since who asked for a resource may still hold it when it is defined no more.
fn kept(text: &str) -> &'static str {
    static KEPT: Mutex<BTreeMap<String, &str>> = Mutex::new(BTreeMap::new());
    lock(&KEPT).entry(text.to_owned()).or_insert_with_key(|text| text.clone().leak())
}

/// The text, if all samples that it reads are within the scope and over the window, and objects are told apart: beside
/// selections and lists of labels there are signs, numbers, and words that begin a call.
fn template(text: &str) -> Option<String> {
    let word = |c: char| c.is_ascii_alphanumeric() || "_:".contains(c);
    let (mut rest, mut depth) = (text, 0_usize);
    while !rest.is_empty() {
        let (name, after) = rest.split_at(rest.find(|c| !word(c)).unwrap_or(rest.len()));
        let next = after.trim_start();
        let number = name.starts_with(|c: char| c.is_ascii_digit()) && name.chars().all(|c| "0123456789e".contains(c));
        let call = next.starts_with('(') && !UNFIT.split(' ').any(|it| it.eq_ignore_ascii_case(name));
        rest = match (name, after.strip_prefix("{$matchers")) {
            ("", _) => {
                depth = (depth + usize::from(rest.starts_with('('))).checked_sub(usize::from(rest.starts_with(')')))?;
                rest.strip_prefix(|c| " .,+-*/%^<>=!()".contains(c))?
            }
            (_, Some(selection)) => {
                let (more, after) = selection.split_once("}[$window]")?;
                for matcher in more.split(',').skip(1) {
                    let (start, value) = matcher.trim().strip_suffix('"')?.split_once('"')?;
                    let signed = ["=", "!=", "=~", "!~"].contains(&start.trim_start_matches(word).trim());
                    Some(value).filter(|it| signed && !it.contains(['"', '\\', '$', '\n']))?;
                }
                Some(after).filter(|_| more.is_empty() || more.starts_with(','))?
            }
            ("by" | "on", _) => {
                let (list, after) = next.strip_prefix('(')?.split_once("$by)")?;
                // Else its last label would run into the first of the object's.
                let ended = list.trim().is_empty() || list.trim_end().ends_with(',');
                Some(after).filter(|_| ended && list.chars().all(|c| word(c) || ", ".contains(c)))?
            }
            _ => Some(after).filter(|_| number || call || next.starts_with("by"))?,
        };
    }
    Some(text.to_owned()).filter(|text| depth == 0 && text.contains('{') && text.contains("$by)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The hash of what is in force, and whether the newest file is unusable.
    fn state(Definitions(state): &Definitions) -> (String, bool) {
        let (in_force, mistake) = &*lock(state);
        (in_force.map(|file| file.hash.clone()).unwrap_or_default(), mistake.is_some())
    }
    use crate::selector::Operator;

    const TEMPLATE: &str = "histogram_quantile(0.9, sum by (le, $by) (rate(a_bucket{$matchers,c=~\"5[0-9]+\"}[$window])))";

    fn file(metrics: &Value) -> Vec<u8> {
        json!({ "metrics": metrics }).to_string().into_bytes()
    }

    /// The definition of the metric `m` of `a` that has these fields besides.
    fn defined(mut fields: Value) -> Result<Definition, String> {
        for (key, value) in [("name", "m"), ("metric", "a")] {
            fields[key] = fields.get(key).cloned().unwrap_or_else(|| json!(value));
        }
        parse(&file(&json!([fields]))).map(|file| file.metrics.into_iter().next().expect("one definition"))
    }

    /// The resources that this one, with these fields in place of its own, makes.
    fn resource(fields: &Value) -> Result<Vec<Resource>, String> {
        let mut queue = json!({ "kind": "Queue", "plural": "queues", "apiVersion": "rabbitmq.com/v1beta1", "label": "queue" });
        for (key, value) in fields.as_object().expect("fields") {
            queue[key] = value.clone();
        }
        parse(json!({ "resources": [queue] }).to_string().as_bytes()).map(|file| file.resources)
    }

    #[test]
    fn every_field_has_its_meaning() {
        let plain = defined(json!({ "metric": "net.http.request.time" })).unwrap();
        let [name, metric] = ["m", "net.http.request.time"].map(str::to_owned);
        assert_eq!(plain, Definition { name, metric, ..Definition::default() });
        let check = |field: Value, expected: &dyn Fn(&mut Definition)| {
            let mut wanted = defined(json!({})).unwrap();
            expected(&mut wanted);
            assert_eq!(defined(field.clone()), Ok(wanted), "{field}");
        };
        check(json!({ "selector": "a=b,!c,sysdig/window=2m" }), &|it| {
            let unwanted = Requirement { key: "c".to_owned(), operator: Operator::DoesNotExist, values: Vec::new() };
            let of = |key: &str, value: &str| Requirement::is(key, [value.to_owned()]);
            it.selector = vec![of("a", "b"), unwanted, of("sysdig/window", "2m")];
        });
        check(json!({ "scope": "workload" }), &|_| {});
        check(json!({ "scope": "namespace" }), &|it| it.scope = Some(&Resource::NAMESPACES));
        check(json!({ "scope": "cluster" }), &|it| it.scope = Some(&Resource::CLUSTER));
        check(json!({ "divideBy": 1_000_000, "decimals": 0 }), &|it| {
            (it.divide_by, it.decimals) = (NonZeroU64::new(1_000_000), Some(0));
        });
        check(json!({ "absence": "error" }), &|_| {});
        check(json!({ "absence": "zero" }), &|it| it.absence = (0, true));
        check(json!({ "absence": "hold 10s" }), &|it| it.absence = (10, false));
        check(json!({ "absence": "hold 24h" }), &|it| it.absence = (86_400, false));
        check(json!({ "maxAge": "3m" }), &|it| it.max_age = 180);
        check(json!({ "description": "why" }), &|it| it.description = Some("why".to_owned()));
    }

    #[test]
    fn a_mistake_is_told_with_its_place_and_what_would_be_right() {
        let table = [
            (json!({ "metric": "a'b" }), "must be an id, or PromQL that groups by (…, $by)"),
            (json!({ "scope": "all" }), "\"all\" must be workload, namespace or cluster"),
            (json!({ "selector": "a='b'" }), "must be a selector as an HPA's, settings included"),
            (json!({ "selector": "a=b,sysdig/window=1h" }), "must be a selector"),
            (json!({ "divideBy": 0 }), "invalid value"),
            (json!({ "divideBy": -1 }), "invalid value"),
            (json!({ "divideBy": 1.5 }), "invalid type"),
            (json!({ "decimals": -1 }), "invalid value"),
            (json!({ "absence": "" }), "\"\" must be error, zero, or hold 10s to hold 24h"),
            (json!({ "absence": "hold" }), "must be error"),
            (json!({ "absence": "hold 9s" }), "must be error"),
            (json!({ "absence": "hold 25h" }), "must be error"),
            (json!({ "absence": "none" }), "must be error"),
            (json!({ "maxAge": "" }), "\"\" must be 10s to 24h"),
            (json!({ "maxAge": "1s" }), "must be 10s to 24h"),
            (json!({ "maxAge": 60 }), "invalid type"),
            (json!({ "nope": 1 }), "unknown field `nope`"),
            (json!({ "name": "" }), "\"\" must be letters, digits, _ . : - only"),
            (json!({ "name": "a b" }), "must be letters"),
            (json!({ "name": "..." }), "must be letters"),
        ];
        for (fields, mistake) in table {
            let found = defined(fields.clone()).expect_err(&fields.to_string());
            assert!(found.contains(mistake) && found.contains(" at line 1 column "), "{fields}: {found}");
        }
        for text in ["", "{\"metrics\":[]", "{\"metrics\":[],\"more\":1}", "{\"metrics\":{}}", "\u{feff}{}"] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
        for (text, field) in [(r#"{"metrics":[{"metric":"a"}]}"#, "name"), (r#"{"metrics":[{"name":"a"}]}"#, "metric")] {
            let found = parse(text.as_bytes()).expect_err(text);
            assert!(found.starts_with(&format!("missing field `{field}` at line 1")), "{found}");
        }
        assert_eq!(parse(b"{}").map(|file| (file.metrics, file.resources)), Ok((Vec::new(), Vec::new())));
    }

    #[test]
    fn no_name_is_given_twice() {
        for name in ["cpu.used.percent", "sysdig_container_cpu_used_percent"] {
            let expected = format!("{name:?} is the name of something else already");
            assert_eq!(defined(json!({ "name": name })), Err(expected));
        }
        let twice = file(&json!([{ "name": "m", "metric": "a" }, { "name": "m", "metric": "b" }]));
        assert_eq!(parse(&twice), Err("\"m\" is the name of something else already".to_owned()));
        let deployments = json!({ "plural": "deployments", "apiVersion": "apps/v2" });
        assert!(resource(&deployments).unwrap_err().contains("\"deployments.apps\" is the name of something else"));
        assert!(resource(&json!({ "plural": "pods", "apiVersion": "v1" })).is_err());
        assert!(resource(&json!({ "plural": "deployments", "apiVersion": "extensions/v1beta1" })).is_err());
        assert!(resource(&json!({ "plural": "pods" })).is_ok(), "pods of another group are no pods");
    }

    #[test]
    fn a_custom_resource_has_kubernetes_words_and_a_label_of_sysdigs() {
        let found = resource(&json!({})).unwrap();
        let [kind, api_version] = ["Queue", "rabbitmq.com/v1beta1"];
        let expected = Resource { kind, plural: "queues", api_version, label: "queue", workload_type: "" };
        assert_eq!(found, [expected]);
        assert!(found[0].is_namespaced() && !found[0].counts_pods());
        let again = resource(&json!({})).unwrap();
        assert!(std::ptr::eq(found[0].kind, again[0].kind), "each word is kept once");
        for (field, value) in [
            ("kind", "A\"b"),
            ("kind", ""),
            ("kind", "a b"),
            ("plural", "Queues"),
            ("plural", "a/b"),
            ("plural", ".."),
            ("plural", ""),
            ("apiVersion", "a/b/c"),
            ("apiVersion", "a?b"),
            ("apiVersion", "../x"),
            ("label", "a}"),
            ("label", "é"),
            ("label", "a=b"),
            ("workloadType", "deployment"),
        ] {
            assert!(resource(&json!({ field: value })).is_err(), "{field}: {value}");
        }
    }

    #[test]
    fn all_that_a_template_selects_is_within_the_scope_and_over_a_window() {
        let good = [
            TEMPLATE,
            "sum by ($by) (increase(a:b{$matchers}[$window])) / sum by ($by) (increase(c{$matchers}[$window]))",
            "max by ($by) (max_over_time(a{$matchers,b=\"\"}[$window]))",
            "max by ($by) (max_over_time(a{$matchers, b!=\"x/y\", c=~\"(d|e).*\",f !~ \"g\"}[$window]))",
            "sum by (le, b, $by) (rate(a{$matchers}[$window]))",
            "sum by ($by) (rate(a{$matchers,b=~\"5[0-9]{2}|[}]\"}[$window]))",
            "sum by ($by) (rate(a{$matchers}[$window])) or (0 * sum by ($by) (rate(b{$matchers}[$window])) > 1e3)",
            "sum by ($by) (rate(a{$matchers}[$window])) * on ($by) group_left () max by ($by) (rate(b{$matchers}[$window]))",
            "clamp_max(100 * avg by ($by) (avg_over_time(a{$matchers}[$window])) - 2.5 ^ 2, 7)",
        ];
        for template in good {
            assert_eq!(defined(json!({ "metric": template })).map(|it| it.metric), Ok(template.to_owned()));
        }
        let by = |text: &str| format!("sum by ($by) ({text})");
        let selected = by("rate(a{$matchers}[$window])");
        let bad = [
            by("up"),
            by("a{$matchers}"),
            by("rate(a{$matchers}[5m])"),
            by("rate(a{b=\"c\",$matchers}[$window])"),
            by("rate(a{}[$window])"),
            by("rate({$matchers}[$window])"),
            by("rate(a {$matchers}[$window])"),
            by("rate(a{$matchers}[$window]) + rate(b[5m])"),
            by("rate(b[5m]) + rate(a{$matchers}[$window])"),
            by("b @ 0 + rate(a{$matchers}[$window])"),
            by("rate(a{$matchers}[$window] @ 0)"),
            by("rate(a{$matchers}[$window])[1h:1m]"),
            by("rate(a{$matchers}[$window] offset 1h)"),
            by("rate(a{$matchers}[$window]offset 1h)"),
            by("rate(a{$matchers}[$window] offset (1h))"),
            by("rate(a{$matchers}[$window] OFFSET (60))"),
            by("info(rate(a{$matchers}[$window]))"),
            by("rate(a{$matchers}[$window] anchored)"),
            by("a{$matchers[$window]"),
            by("rate(a{$matchers}}[$window])"),
            by("a{$matchers{$matchers}[$window]"),
            by("rate(a{$matchers,b=\"}[$window]) + rate(c{$matchers,d=\"}[$window])"),
            by("rate(a{$matchers,b=\"\\\"}[$window])"),
            by("rate(a{$matchers,b='c'}[$window])"),
            by("rate(a{$matchers,b=\"\n\"}[$window])"),
            by("rate(a{$matchers,b=\"$matchers\"}[$window])"),
            by("rate(a{$matchers,b=\"c\" or d=\"e\"}[$window])"),
            by("rate(a{$matchers or d=\"e\"}[$window])"),
            by("rate(a{$matchers,b=`c`}[$window])"),
            format!("{selected} or (vector(0))"),
            format!("{selected} or (vector(time()))"),
            format!("{selected} or (0 * hour())"),
            format!("{selected} or absent_over_time(a{{$matchers}}[$window])"),
            format!("{selected} / scalar({selected})"),
            format!("topk(1, {selected})"),
            format!("TopK (1, {selected})"),
            format!("sum({selected})"),
            "sum by ($by) (topk(3, rate(a{$matchers}[$window])))".to_owned(),
            "max(max_over_time(a{$matchers}[$window])) by ($by)".to_owned(),
            by("rate(a{$matchers,b\"c\"}[$window])"),
            by("rate(a{$matchers,b==\"c\"}[$window])"),
            "sum by ($by) (rate(a{$matchers}[$window])".to_owned(),
            "sum by ($by) (rate(a{$matchers}[$window])))(".to_owned(),
            "sum by (le$by) (rate(a{$matchers}[$window]))".to_owned(),
            by("rate(a{$matchers,or x=\"y\"}[$window])"),
            format!("{selected} or up"),
            format!("{selected} or (up)"),
            format!("{selected} or b{{c=\"d\"}}"),
            format!("{selected} or up:rate"),
            format!("{selected} or or"),
            format!("up or {selected}"),
            format!("sum($by) + {selected}"),
            format!("{selected} + $by"),
            format!("{selected} + histogram_fraction(0, $by)"),
            format!("{selected} or {{__name__=\"up\"}}"),
            format!("{selected} or \"up\""),
            format!("{selected} # more"),
            format!("{selected}\n"),
            format!("{selected};"),
            "sum(rate(a{$matchers}[$window]))".to_owned(),
            "rate(a{$matchers}[$window])".to_owned(),
            "sum by (a!=, $by) (rate(a{$matchers}[$window]))".to_owned(),
            "sum by (a, $by, b) (rate(a{$matchers}[$window]))".to_owned(),
            "$by{$matchers}[$window]".to_owned(),
            "sum(a)".to_owned(),
            by("0"),
            String::new(),
        ];
        for template in bad {
            let mistake = defined(json!({ "metric": template })).expect_err(&template);
            assert!(mistake.contains("must be an id, or PromQL that groups by"), "{template}: {mistake}");
        }
    }

    #[test]
    fn a_bad_file_leaves_the_last_good_one_in_force() {
        let definitions = Definitions::default();
        assert_eq!(definitions.find("m").unwrap().metric, "", "without a file a metric is what it is");
        assert_eq!(state(&definitions), (String::new(), false));
        assert!(definitions.load(Err("gone".to_owned())).is_err());
        assert_eq!(state(&definitions), (String::new(), true));
        let refusal = definitions.find("m").expect_err("its definition might say something else");
        assert_eq!(refusal.reason, Reason::NotConfigured);
        assert!(refusal.message.ends_with("CONFIG_FILE is not usable: gone"), "{}", refusal.message);
        let first = definitions.load(Ok(file(&json!([])))).unwrap();
        assert_eq!((first.len(), state(&definitions)), (16, (first.to_owned(), false)));
        for bad in [Err("gone".to_owned()), Ok(Vec::new())] {
            assert!(definitions.load(bad).is_err());
            assert_eq!(definitions.find("m").unwrap().metric, "");
            assert_eq!(state(&definitions), (first.to_owned(), true));
        }
        let good = file(&json!([{ "name": "m", "metric": "a", "maxAge": "1m" }, { "name": "n", "metric": "b" }]));
        let second = definitions.load(Ok(good)).unwrap();
        assert_ne!(second, first);
        assert!(definitions.load(Ok(b"{".to_vec())).is_err());
        assert_eq!(state(&definitions), (second.to_owned(), true));
        let found = definitions.find("m").unwrap();
        assert_eq!((found.metric.as_str(), found.max_age), ("a", 60));
        assert_eq!(definitions.find("other").unwrap().metric, "");
    }
}
