//! The filter language of the Data API, as documented: `[not] label operator value`, joined by `and` and `or`.

use super::world::{Container, World};

/// A filter that was understood. `and` binds tighter than `or`; nothing says so, so tests should not mix them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter(Vec<Vec<Term>>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Term {
    negated: bool,
    label: String,
    test: Test,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    Contains(String),
    Equals(Option<String>),
    In(Vec<String>),
    StartsWith(String),
    Unequal(Option<String>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Quoted(String),
    /// A label, an operator, a key word or a sign.
    Word(String),
}

impl Filter {
    /// Errors: what a person who wrote the filter needs to know.
    pub fn parse(text: &str, world: &World) -> Result<Self, String> {
        let mut tokens = tokens(text)?.into_iter().peekable();
        let mut any = Vec::new();
        let mut all = Vec::new();
        loop {
            let term = term(&mut tokens)?;
            if !world.is_label(&term.label) {
                return Err(format!("'{}' is not a known label", term.label));
            }
            all.push(term);
            match tokens.next() {
                None => break,
                Some(Token::Word(word)) if word.eq_ignore_ascii_case("and") => {}
                Some(Token::Word(word)) if word.eq_ignore_ascii_case("or") => any.push(std::mem::take(&mut all)),
                Some(other) => return Err(format!("and, or or the end expected, found {other:?}")),
            }
        }
        any.push(all);
        Ok(Self(any))
    }

    pub fn matches(&self, container: &Container) -> bool {
        self.0.iter().any(|all| all.iter().all(|term| term.matches(container)))
    }
}

impl Term {
    fn matches(&self, container: &Container) -> bool {
        let value = container.label(&self.label);
        let found = match &self.test {
            Test::Contains(part) => value.is_some_and(|value| value.contains(part)),
            Test::Equals(wanted) => value == wanted.as_deref(),
            Test::In(wanted) => value.is_some_and(|value| wanted.iter().any(|one| one == value)),
            Test::StartsWith(start) => value.is_some_and(|value| value.starts_with(start)),
            Test::Unequal(unwanted) => value != unwanted.as_deref(),
        };
        found != self.negated
    }
}

type Tokens = std::iter::Peekable<std::vec::IntoIter<Token>>;

fn term(tokens: &mut Tokens) -> Result<Term, String> {
    let mut label = word(tokens, "a label")?;
    let negated = label.eq_ignore_ascii_case("not");
    if negated {
        label = word(tokens, "a label")?;
    }
    let is_label = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    if !label.starts_with(|c: char| c.is_ascii_alphabetic()) || !label.chars().all(is_label) {
        return Err(format!("a label expected, found {label}"));
    }
    let test = match word(tokens, "an operator")?.to_ascii_lowercase().as_str() {
        "=" => Test::Equals(value_or_null(tokens)?),
        "!=" => Test::Unequal(value_or_null(tokens)?),
        "contains" => Test::Contains(value(tokens)?),
        "in" => Test::In(list(tokens)?),
        "starts" => {
            sign(tokens, "with")?;
            Test::StartsWith(value(tokens)?)
        }
        other => return Err(format!("'{other}' is not an operator")),
    };
    Ok(Term { negated, label, test })
}

fn list(tokens: &mut Tokens) -> Result<Vec<String>, String> {
    sign(tokens, "(")?;
    let mut values = vec![value(tokens)?];
    loop {
        match word(tokens, ", or )")?.as_str() {
            "," => values.push(value(tokens)?),
            ")" => return Ok(values),
            other => return Err(format!(", or ) expected, found {other}")),
        }
    }
}

fn value(tokens: &mut Tokens) -> Result<String, String> {
    match tokens.next() {
        Some(Token::Quoted(value)) => Ok(value),
        other => Err(format!("a quoted value expected, found {other:?}")),
    }
}

fn value_or_null(tokens: &mut Tokens) -> Result<Option<String>, String> {
    if tokens.next_if_eq(&Token::Word("null".to_owned())).is_some() {
        return Ok(None);
    }
    value(tokens).map(Some)
}

fn word(tokens: &mut Tokens, expected: &str) -> Result<String, String> {
    match tokens.next() {
        Some(Token::Word(word)) => Ok(word),
        other => Err(format!("{expected} expected, found {other:?}")),
    }
}

fn sign(tokens: &mut Tokens, expected: &str) -> Result<(), String> {
    let found = word(tokens, expected)?;
    if found.eq_ignore_ascii_case(expected) { Ok(()) } else { Err(format!("{expected} expected, found {found}")) }
}

fn tokens(text: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let (token, length) = match first {
            '\'' | '"' => {
                let inner = &rest[1..];
                let end = inner.find(first).ok_or_else(|| format!("a {first} is not closed"))?;
                let value = &inner[..end];
                // Nobody knows how one is taken, so a client that sends one is wrong either way.
                if value.contains('\\') {
                    return Err("a backslash in a value".to_owned());
                }
                (Token::Quoted(value.to_owned()), end + 2)
            }
            '(' | ')' | ',' | '=' => (Token::Word(first.to_string()), 1),
            '!' if rest.starts_with("!=") => (Token::Word("!=".to_owned()), 2),
            _ => {
                let ends = |c: char| c.is_whitespace() || "'\"(),=!".contains(c);
                let end = rest.find(ends).unwrap_or(rest.len());
                if end == 0 {
                    return Err(format!("'{first}' is not understood"));
                }
                (Token::Word(rest[..end].to_owned()), end)
            }
        };
        tokens.push(token);
        rest = rest[length..].trim_start();
    }
    Ok(tokens)
}
