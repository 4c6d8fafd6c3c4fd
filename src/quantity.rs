//! Decimal numbers as Kubernetes quantities: parsed exactly, printed canonically.
//!
//! A [`Quantity`] counts billionths, the finest unit Kubernetes has. It never wraps, saturates
//! or turns a non-zero number into zero: what does not fit is an error.
//! Source: <https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/>.

use std::fmt;

const NANOS: i128 = 1_000_000_000;

/// The horizontal pod autoscaler computes in thousandths held in 64 bits, so a quantity beyond
/// that would be cut there.
const MAX_NANOS: i128 = i64::MAX as i128 * (NANOS / 1000);

/// Suffixes of the decimal SI form, largest first, with their power of ten in billionths.
const SUFFIXES: [(u32, &str); 9] =
    [(24, "P"), (21, "T"), (18, "G"), (15, "M"), (12, "k"), (9, ""), (6, "m"), (3, "u"), (0, "n")];

/// A number in billionths, within what a HorizontalPodAutoscaler can compute with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Quantity(i128);

/// Why a number is not a [`Quantity`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuantityError {
    /// NaN or an infinity.
    NotFinite,
    /// Not a decimal number.
    NotANumber,
    /// Larger in magnitude than 9223372036854775.807.
    OutOfRange,
}

impl Quantity {
    /// The quantity 0.
    pub const ZERO: Self = Self(0);

    /// Takes the shortest decimal that names this float, which is the number its writer meant:
    /// 93.725 stays 93.725.
    pub fn from_f64(value: f64) -> Result<Self, QuantityError> {
        if !value.is_finite() {
            return Err(QuantityError::NotFinite);
        }
        Self::parse(&value.to_string())
    }

    /// Reads a decimal as JSON and PromQL write it: `-12.5`, `1e+06`, `NaN`, `+Inf`.
    ///
    /// Digits below a billionth are rounded half to even, but never to zero.
    pub fn parse(text: &str) -> Result<Self, QuantityError> {
        let (negative, unsigned) = match text.as_bytes() {
            [b'-', ..] => (true, text.get(1..).unwrap_or_default()),
            [b'+', ..] => (false, text.get(1..).unwrap_or_default()),
            _ => (false, text),
        };
        if ["nan", "inf", "infinity"].iter().any(|word| unsigned.eq_ignore_ascii_case(word)) {
            return Err(QuantityError::NotFinite);
        }
        let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
            Some((mantissa, exponent)) => (mantissa, parse_exponent(exponent)?),
            None => (unsigned, 0),
        };
        let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let digits: Vec<u8> = whole.bytes().chain(fraction.bytes()).collect();
        if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
            return Err(QuantityError::NotANumber);
        }
        let scale = exponent.saturating_add(9).saturating_sub(fraction.len() as i64);
        let nanos = scale_digits(&digits, scale)?;
        Ok(Self(if negative { -nanos } else { nanos }))
    }
}

fn parse_exponent(text: &str) -> Result<i64, QuantityError> {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if digits.is_empty() || digits.len() > 9 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(QuantityError::NotANumber);
    }
    text.parse().map_err(|_| QuantityError::NotANumber)
}

/// `digits` × 10^`scale`, rounded half to even, as a magnitude in billionths.
fn scale_digits(digits: &[u8], scale: i64) -> Result<i128, QuantityError> {
    let significant: Vec<u8> = digits.iter().copied().skip_while(|&d| d == b'0').collect();
    if significant.is_empty() {
        return Ok(0);
    }
    let kept = significant.len() as i64 + scale;
    if kept > 26 {
        return Err(QuantityError::OutOfRange);
    }
    let digit_at =
        |index: i64| usize::try_from(index).ok().and_then(|i| significant.get(i)).map_or(0, |d| i128::from(d - b'0'));
    let mut nanos = (0..kept.max(0)).fold(0, |sum: i128, index| sum * 10 + digit_at(index));
    let first_dropped = if kept < 0 { 0 } else { digit_at(kept) };
    let beyond = kept >= 0 && significant.iter().skip(kept as usize + 1).any(|&d| d != b'0');
    if first_dropped > 5 || (first_dropped == 5 && (beyond || nanos % 2 == 1)) {
        nanos += 1;
    }
    let nanos = nanos.max(1);
    if nanos > MAX_NANOS { Err(QuantityError::OutOfRange) } else { Ok(nanos) }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            return f.write_str("0");
        }
        for (power, suffix) in SUFFIXES {
            let unit = 10_i128.pow(power);
            if self.0 % unit == 0 {
                return write!(f, "{}{suffix}", self.0 / unit);
            }
        }
        Ok(())
    }
}

impl fmt::Display for QuantityError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotFinite => "is not a finite number",
            Self::NotANumber => "is not a number",
            Self::OutOfRange => "is beyond what a HorizontalPodAutoscaler can compute with (9223372036854775.807)",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_become_canonical_quantities() {
        let table = [
            ("0", "0"),
            ("0.0", "0"),
            ("-0", "0"),
            ("0e400", "0"),
            ("6.75", "6750m"),
            ("93.725", "93725m"),
            ("0.0004", "400u"),
            ("8", "8"),
            ("-2.5", "-2500m"),
            ("1000", "1k"),
            ("24000", "24k"),
            ("1503006.75", "1503006750m"),
            ("1e3", "1k"),
            ("1E+06", "1M"),
            ("5e-9", "5n"),
            ("+7", "7"),
            (".5", "500m"),
            ("5.", "5"),
            ("0.0000000015", "2n"),
            ("0.0000000025", "2n"),
            ("0.00000000250001", "3n"),
            ("1e-30", "1n"),
            ("-1e-30", "-1n"),
            ("0.0000000004", "1n"),
            ("0.99999999999", "1"),
            ("9223372036854775.807", "9223372036854775807m"),
            ("9e15", "9P"),
            ("100000000000000000000e-20", "1"),
        ];
        for (text, canonical) in table {
            assert_eq!(Quantity::parse(text).map(|q| q.to_string()), Ok(canonical.to_owned()), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_fitting_number_is_refused() {
        let table = [
            ("NaN", QuantityError::NotFinite),
            ("+Inf", QuantityError::NotFinite),
            ("-inf", QuantityError::NotFinite),
            ("1e300", QuantityError::OutOfRange),
            ("9223372036854775.808", QuantityError::OutOfRange),
            ("-9223372036854775.808", QuantityError::OutOfRange),
            ("1e999999999", QuantityError::OutOfRange),
            ("", QuantityError::NotANumber),
            ("-", QuantityError::NotANumber),
            (".", QuantityError::NotANumber),
            ("1e", QuantityError::NotANumber),
            ("1e+", QuantityError::NotANumber),
            ("1e9999999999", QuantityError::NotANumber),
            ("1,5", QuantityError::NotANumber),
            ("0x10", QuantityError::NotANumber),
            ("--1", QuantityError::NotANumber),
            (" 1", QuantityError::NotANumber),
            ("1.2.3", QuantityError::NotANumber),
            ("é", QuantityError::NotANumber),
        ];
        for (text, error) in table {
            assert_eq!(Quantity::parse(text), Err(error), "{text}");
        }
    }

    #[test]
    fn a_float_is_the_decimal_its_writer_meant() {
        for (float, canonical) in [
            (93.725, "93725m"),
            (0.1 + 0.2, "300m"),
            (1e-9, "1n"),
            (-0.0, "0"),
            (f64::MIN_POSITIVE, "1n"),
            (1e15, "1P"),
        ] {
            assert_eq!(Quantity::from_f64(float).unwrap().to_string(), canonical, "{float}");
        }
        assert_eq!(Quantity::from_f64(f64::NAN), Err(QuantityError::NotFinite));
        assert_eq!(Quantity::from_f64(f64::MAX), Err(QuantityError::OutOfRange));
    }
}
