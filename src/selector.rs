//! Label selectors in Kubernetes' words: which samples of a metric count, and how they become one value. Pure.
//! Source: <https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#label-selectors>.

use crate::config::duration;
use crate::prelude::*;
use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

/// What a label must be: letters, digits, `-`, `_`, `.` only, and in the key one `/` at most.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Requirement {
    pub key: String,
    pub operator: Operator,
    /// Empty for what only exists or does not.
    pub values: Vec<String>,
}

/// How samples become one value: over time and over the containers of an object in Sysdig's words, and the seconds
/// of samples. As Sysdig Monitor itself does by default: `avg` over all, that is load per pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tuning {
    pub time: &'static str,
    /// Empty if nobody declared one.
    pub group: &'static str,
    pub window: u64,
}

/// What begins so is no label of Sysdig's but a setting of ours.
const RESERVED: &str = "sysdig/";
const LONGEST: usize = 4096;
const GRAMMAR: &str = "label=value, label!=value, label in (a,b), label notin (a,b), label, !label, \
     sysdig/time-aggregation=avg|timeAvg|sum|min|max, sysdig/group-aggregation=avg|sum|min|max \
     and sysdig/window=20s to 10m in steps of 10s";

impl Requirement {
    pub fn is(key: &str, values: impl IntoIterator<Item = String>) -> Self {
        Self { key: key.to_owned(), operator: Operator::In, values: values.into_iter().collect() }
    }

    fn parse(part: &str) -> Option<Self> {
        let listed = part.strip_suffix(')').and_then(|part| part.split_once('('));
        let listed = listed.and_then(|(head, list)| Some((head.trim().rsplit_once(char::is_whitespace)?, list)));
        let (key, operator, list) = match (part.strip_prefix('!'), part.split_once("!="), part.split_once('='), listed) {
            (Some(key), ..) => (key, Operator::DoesNotExist, None),
            (_, Some((key, value)), ..) => (key, Operator::NotIn, Some(value)),
            (_, _, Some((key, value)), _) => (key, Operator::In, Some(value.strip_prefix('=').unwrap_or(value))),
            (.., Some(((key, "in"), list))) => (key, Operator::In, Some(list)),
            (.., Some(((key, "notin"), list))) => (key, Operator::NotIn, Some(list)),
            _ => (part, Operator::Exists, None),
        };
        let values = list.into_iter().flat_map(|list| list.split(',')).map(|value| value.trim().to_owned());
        let found = Self { key: key.trim().to_owned(), operator, values: values.collect() };
        let named = found.key.splitn(2, '/').all(|part| !part.is_empty() && is_label(part));
        (named && found.values.iter().all(|value| is_label(value))).then_some(found)
    }
}

impl Tuning {
    pub const DEFAULT: Self = Self { time: "avg", group: "", window: 60 };

    /// Takes a setting over. None if it is not understood.
    fn set(&mut self, Requirement { key, operator, values }: &Requirement) -> Option<()> {
        let value = values.first().filter(|_| values.len() == 1 && *operator == Operator::In)?;
        let known = |list: &[&'static str]| list.iter().copied().find(|known| known == value);
        // A window holds finished points of 10 s, and never just the newest one.
        let finished = |seconds: &u64| (20..=600).contains(seconds) && seconds.is_multiple_of(10);
        match key.strip_prefix(RESERVED)? {
            "time-aggregation" => self.time = known(&["avg", "timeAvg", "sum", "min", "max"])?,
            "group-aggregation" => self.group = known(&["avg", "sum", "min", "max"])?,
            "window" => self.window = duration(value).map(|it| it.as_secs()).filter(finished)?,
            _ => return None,
        }
        Some(())
    }
}

/// Understands the selector of a metric, settings included. Errors: 400, with the position (from 1) of what is wrong.
pub fn parse(text: &str) -> Result<Vec<Requirement>, Error> {
    let (mut requirements, mut position, mut depth) = (Vec::new(), 1, 0_usize);
    let parts = text.split(|c| {
        depth = if c == '(' { depth + 1 } else { depth.saturating_sub(usize::from(c == ')')) };
        c == ',' && depth == 0
    });
    let fits = |it: &Requirement| !it.key.starts_with(RESERVED) || { Tuning::DEFAULT }.set(it).is_some();
    for part in parts.filter(|_| !text.is_empty()) {
        let found = Requirement::parse(part.trim()).filter(|it| text.len() <= LONGEST && fits(it));
        let what = || format!("the selector of the metric {} is not understood at position {position}", quoted(text));
        requirements.push(found.ok_or_else(|| refusal!(InvalidRequest, "{}: it takes {GRAMMAR}", what()))?);
        position += part.len() + 1;
    }
    Ok(requirements)
}

/// What samples must fulfil, and the settings.
pub fn settle(requirements: &[Requirement]) -> (Vec<Requirement>, Tuning) {
    let mut tuning = Tuning::DEFAULT;
    let labels = requirements.iter().filter(|it| tuning.set(it).is_none());
    (labels.cloned().collect(), tuning)
}

/// The requirements as a LabelSelector object, in its short form where there is one; null if there are none.
pub fn label_selector(requirements: &[Requirement]) -> Value {
    let plain = requirements.iter().filter(|it| it.operator == Operator::In && it.values.len() == 1);
    let labels: BTreeMap<_, _> = plain.filter_map(|it| Some((&it.key, it.values.first()?))).collect();
    match requirements.len() {
        0 => Value::Null,
        all if all == labels.len() => json!({ "matchLabels": labels }),
        _ => json!({ "matchExpressions": requirements }),
    }
}

/// What Kubernetes lets stand in a label: nothing that means anything in a query.
fn is_label(text: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    text.len() <= 63 && text.bytes().all(fits) && text.trim_matches(['-', '_', '.']) == text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<(Vec<Requirement>, Tuning), Error> {
        parse(text).map(|found| settle(&found))
    }

    #[test]
    fn labels_and_reserved_keys_are_told_apart() {
        let default = Tuning::DEFAULT;
        let check = |text: &str, labels: &[(&str, &str)], tuning: Tuning| {
            let (found, tuned) = parsed(text).unwrap();
            let pairs: Vec<_> = found.iter().map(|it| (it.key.as_str(), it.values[0].as_str())).collect();
            assert_eq!((pairs.as_slice(), tuned), (labels, tuning), "{text}");
        };
        check("", &[], default);
        check("a=b", &[("a", "b")], default);
        check("a==b , net.http.method=GET", &[("a", "b"), ("net.http.method", "GET")], default);
        check("x.y/a=", &[("x.y/a", "")], default);
        check("sysdig/group-aggregation=sum", &[], Tuning { group: "sum", ..default });
        check("sysdig/group-aggregation=max,a=b", &[("a", "b")], Tuning { group: "max", ..default });
        check("sysdig/time-aggregation=timeAvg", &[], Tuning { time: "timeAvg", ..default });
        check("sysdig/window=20s", &[], Tuning { window: 20, ..default });
        check("sysdig/window=10m", &[], Tuning { window: 600, ..default });
        check("sysdig/window in (2m)", &[], Tuning { window: 120, ..default });
    }

    #[test]
    fn every_operator_of_kubernetes_is_understood() {
        use Operator::{DoesNotExist, Exists, In, NotIn};
        // The second is how the HPA writes it.
        type Parts<'a> = &'a [(&'a str, Operator, &'a [&'a str])];
        let table: [(&str, Parts<'_>); 7] = [
            ("a!=b", &[("a", NotIn, &["b"])]),
            (
                "a.b/c notin (x,yy),ex,net.http.method=GET",
                &[("a.b/c", NotIn, &["x", "yy"]), ("ex", Exists, &[]), ("net.http.method", In, &["GET"])],
            ),
            ("!a", &[("a", DoesNotExist, &[])]),
            ("! a ,b", &[("a", DoesNotExist, &[]), ("b", Exists, &[])]),
            ("a in (b)", &[("a", In, &["b"])]),
            ("a  in ( b , c,)", &[("a", In, &["b", "c", ""])]),
            ("in in (in)", &[("in", In, &["in"])]),
        ];
        for (text, expected) in table {
            let (found, _) = parsed(text).unwrap();
            let found: Vec<(&str, Operator, Vec<&str>)> =
                found.iter().map(|it| (it.key.as_str(), it.operator, it.values.iter().map(String::as_str).collect())).collect();
            let expected: Vec<_> = expected.iter().map(|(key, operator, list)| (*key, *operator, list.to_vec())).collect();
            assert_eq!(found, expected, "{text}");
        }
    }

    #[test]
    fn what_is_not_understood_is_named_with_its_position() {
        let longest = "a".repeat(64);
        let table = [
            ("a=b,a in b", 5),
            ("a=b,a in (b,c),d in (", 16),
            ("a=b,a on (b,c)", 5),
            ("a in (b", 1),
            ("a in b)", 1),
            ("a in ((b))", 1),
            ("a (b)", 1),
            ("!a=b", 1),
            ("!!a", 1),
            ("!", 1),
            ("a>1", 1),
            ("a=b,", 5),
            (",", 1),
            ("a=b=c", 1),
            ("a='b'", 1),
            ("a=b\"", 1),
            ("a notin (b,'c')", 1),
            ("a=-", 1),
            ("=b", 1),
            ("/a=b", 1),
            ("a/=b", 1),
            ("a/b/c=d", 1),
            ("a=b,é=c", 5),
            (&format!("a={longest}"), 1),
            (&format!("{longest}=a"), 1),
            (&format!("a{}", ",a".repeat(3000)), 1),
            ("a=b,sysdig/group-aggregation=SUM", 5),
            ("sysdig/group-aggregation=", 1),
            ("sysdig/group-aggregation", 1),
            ("!sysdig/group-aggregation", 1),
            ("sysdig/group-aggregation!=sum", 1),
            ("sysdig/group-aggregation in (sum,avg)", 1),
            ("sysdig/group-aggregation=timeAvg", 1),
            ("sysdig/time-aggregation=median", 1),
            ("sysdig/window=15s", 1),
            ("sysdig/window=10s", 1),
            ("sysdig/window=1h", 1),
            ("sysdig/window=60", 1),
            ("sysdig/nope=1", 1),
        ];
        for (text, position) in table {
            let message = parsed(text).expect_err(text).message;
            assert!(message.contains(&format!("not understood at position {position}:")), "{text:?}: {message}");
        }
    }

    #[test]
    fn it_goes_back_as_a_label_selector() {
        let back = |text: &str| label_selector(&parse(text).unwrap());
        assert_eq!(back(""), Value::Null);
        assert_eq!(back("a==b, sysdig/window=2m"), json!({ "matchLabels": { "a": "b", "sysdig/window": "2m" } }));
        let expressions = json!([
            { "key": "a", "operator": "In", "values": ["b"] },
            { "key": "c", "operator": "NotIn", "values": ["d"] },
            { "key": "e", "operator": "Exists", "values": [] },
            { "key": "f", "operator": "DoesNotExist", "values": [] },
            { "key": "a", "operator": "In", "values": ["x"] },
        ]);
        assert_eq!(back("a=b,c!=d,e,!f,a=x"), json!({ "matchExpressions": expressions }));
        let both = ["b", "x"].map(|value| json!({ "key": "a", "operator": "In", "values": [value] }));
        assert_eq!(back("a=b,a=x"), json!({ "matchExpressions": both }), "what is asked for twice must hold twice");
    }
}
