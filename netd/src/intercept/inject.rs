//! Puts values into a request and takes the client's own credentials out of it. Owns: that a placeholder goes
//! nowhere, that each header or parameter is written once, and that a request which cannot have its value does
//! not get another one. Pure; values come from the caller.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, STANDARD_NO_PAD},
};
use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{AUTHORIZATION, InvalidHeaderValue},
};
use memchr::memmem;
use sandgate_api::credential::{Inject, PLACEHOLDER_MARK, PlaceholderPlace, Sensitive, VALUE_MARK};
use sandgate_relay::{headers, http1::head::Head};

use super::{
    bindings::{Bindings, Bound},
    query,
};

/// The parts of a request in which values and placeholders stand.
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// The canonical path.
    pub path: String,
    /// The query, as sent.
    pub query: Option<String>,
    /// The headers, those of one connection removed already.
    pub headers: HeaderMap,
}

/// A placeholder where none may be; the secret's name, when it is one of this sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misuse(pub Option<String>);

/// What is to be written once the values are there.
#[derive(Debug, Default)]
pub struct Plan {
    writes: Vec<(String, Inject)>,
    /// Headers that were taken out because a placeholder in them is to be replaced.
    carriers: Vec<(String, HeaderName, HeaderValue)>,
    /// Parameters of the query that were taken out for the same reason.
    parameters: Vec<(String, String)>,
    /// All placeholders of the secrets concerned, with their secret.
    placeholders: Vec<(String, String)>,
}

/// Hexadecimal digits behind the mark of a placeholder.
const PLACEHOLDER_DIGITS: usize = 32;
/// Bytes from the mark to the end of a placeholder.
pub const MARKED: usize = PLACEHOLDER_MARK.len() + PLACEHOLDER_DIGITS;

/// Whether any placeholder stands in `text`: of this sandbox or another one, of a secret that is there or gone.
pub fn is_marked(text: &[u8]) -> bool {
    memmem::find_iter(text, PLACEHOLDER_MARK).any(|at| {
        let digits = text[at + PLACEHOLDER_MARK.len()..]
            .iter()
            .take(PLACEHOLDER_DIGITS);
        digits.filter(|byte| byte.is_ascii_hexdigit()).count() == PLACEHOLDER_DIGITS
    })
}

/// Whether any placeholder stands in the head of a request in clear.
pub fn is_marked_in_clear(head: &Head) -> bool {
    let texts = head.field_values().chain([head.target().as_bytes()]);
    texts
        .flat_map(|text| readings(&String::from_utf8_lossy(text)).collect::<Vec<_>>())
        .any(|reading| is_marked(reading.as_bytes()))
}

/// The ways in which a server may read a text: as it is, percent-decoded, as a Basic credential.
fn readings(text: &str) -> impl Iterator<Item = String> {
    [Some(text.to_owned()), Some(query::decoded(text)), basic(text)]
        .into_iter()
        .flatten()
}

/// The user and password of a Basic credential.
fn basic(value: &str) -> Option<String> {
    let (scheme, rest) = value.trim_start().split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = STANDARD_NO_PAD.decode(rest.trim().trim_end_matches('=')).ok()?;
    Some(String::from_utf8_lossy(&decoded).into_owned())
}

/// Whether one of the placeholders of `bound` stands in `text` where it can be replaced.
fn is_replaceable(text: &str, bound: &Bound) -> bool {
    let inside = basic(text);
    let text = inside.as_deref().unwrap_or(text);
    bound
        .placeholders
        .iter()
        .any(|placeholder| text.contains(placeholder))
}

impl Outgoing {
    fn any_reading(&self, mut wanted: impl FnMut(&str) -> bool) -> bool {
        let query = self.query.as_deref().unwrap_or_default();
        let mut found = |text: &str| readings(text).any(|reading| wanted(&reading));
        found(&self.path)
            || found(query)
            || self
                .headers
                .values()
                .any(|value| found(&String::from_utf8_lossy(value.as_bytes())))
    }

    fn holds(&self, bound: &Bound) -> bool {
        self.any_reading(|text| {
            bound
                .placeholders
                .iter()
                .any(|placeholder| text.contains(placeholder))
        })
    }

    /// Takes out what the bindings `own` of this request replace, and says what is to be written instead.
    ///
    /// # Errors
    /// When a placeholder stands where nothing replaces it.
    pub fn plan(&mut self, bindings: &Bindings, own: &[&Bound], required: &[String]) -> Result<Plan, Misuse> {
        let mut plan = Plan {
            writes: self.choose(own, required),
            ..Plan::default()
        };
        for bound in own {
            let placeholders = bound.placeholders.iter();
            plan.placeholders
                .extend(placeholders.map(|text| (bound.secret.clone(), text.clone())));
        }
        let is_stray = |text: &str| {
            let ours = plan.placeholders.iter();
            let rest = ours.fold(text.to_owned(), |text, (_, placeholder)| {
                text.replace(placeholder, "")
            });
            is_marked(rest.as_bytes())
        };
        if self.any_reading(is_stray) {
            let ours = |bound: &&Bound| own.iter().any(|own| own.secret == bound.secret);
            let owner = bindings.all().find(|bound| !ours(bound) && self.holds(bound));
            return Err(Misuse(owner.map(|bound| bound.secret.clone())));
        }
        self.take_carriers(own, &mut plan);
        if own.iter().any(|bound| bound.strip_client_auth) {
            headers::strip_client_auth(&mut self.headers);
            let stripped = self.query.as_deref().map(headers::strip_client_auth_query);
            self.query = stripped.filter(|query| !query.is_empty());
        }
        for (_, inject) in &plan.writes {
            match target(inject) {
                Some(Target::Header(name)) => {
                    self.headers.remove(&name);
                    plan.carriers.retain(|(_, carrier, _)| *carrier != name);
                }
                Some(Target::Query(parameter)) => {
                    let query = self.query.take();
                    self.query = query.and_then(|query| query::without(&query, |name, _| name == parameter));
                    plan.parameters.retain(|(_, part)| query::name(part) != parameter);
                }
                None => {}
            }
        }
        match own.iter().find(|bound| self.holds(bound)) {
            Some(bound) => Err(Misuse(Some(bound.secret.clone()))),
            None => Ok(plan),
        }
    }

    /// One write for each header and parameter that a binding names.
    fn choose(&self, own: &[&Bound], required: &[String]) -> Vec<(String, Inject)> {
        let mut candidates: BTreeMap<String, Vec<(&Bound, &Inject)>> = BTreeMap::new();
        for bound in own {
            for inject in &bound.inject {
                let key = match target(inject) {
                    Some(Target::Header(name)) => format!("header {name}"),
                    Some(Target::Query(parameter)) => format!("query {parameter}"),
                    None => continue,
                };
                candidates.entry(key).or_default().push((bound, inject));
            }
        }
        let chosen = candidates.into_values().filter_map(|mut list| {
            // A rule's choice counts first, then the client's placeholder, then its scheme.
            narrow(&mut list, |(bound, _)| required.contains(&bound.secret));
            narrow(&mut list, |(bound, _)| self.holds(bound));
            narrow(&mut list, |(_, inject)| self.has_scheme_of(inject));
            list.first()
                .map(|(bound, inject)| (bound.secret.clone(), (*inject).clone()))
        });
        chosen.collect()
    }

    /// Whether the client speaks the scheme that `inject` writes; Git speaks Basic before it was asked.
    fn has_scheme_of(&self, inject: &Inject) -> bool {
        let sent = self.headers.get(AUTHORIZATION);
        let scheme = match sent.and_then(|value| value.to_str().ok()) {
            Some(value) => value.split(' ').next().unwrap_or_default().to_ascii_lowercase(),
            None if self.is_git() => "basic".to_owned(),
            None => return false,
        };
        match inject {
            Inject::Bearer => scheme == "bearer",
            Inject::Basic { .. } => scheme == "basic",
            Inject::Header { format, .. } => {
                let written = format.split(' ').next().unwrap_or_default();
                written.eq_ignore_ascii_case(&scheme)
            }
            Inject::Query { .. } | Inject::Placeholder { .. } => false,
        }
    }

    /// Git's smart protocol over HTTP.
    fn is_git(&self) -> bool {
        ["/info/refs", "/git-upload-pack", "/git-receive-pack"]
            .iter()
            .any(|end| self.path.ends_with(end))
    }

    /// Takes out headers and parameters whose placeholder is to be replaced, so that stripping leaves them alone.
    fn take_carriers(&mut self, own: &[&Bound], plan: &mut Plan) {
        for bound in own {
            let places = bound.inject.iter().flat_map(|inject| match inject {
                Inject::Placeholder { places } => places.as_slice(),
                Inject::Bearer | Inject::Basic { .. } | Inject::Header { .. } | Inject::Query { .. } => &[],
            });
            for place in places {
                match place {
                    PlaceholderPlace::Header => {
                        let mut kept = HeaderMap::with_capacity(self.headers.len());
                        for (name, value) in &self.headers {
                            if is_replaceable(&String::from_utf8_lossy(value.as_bytes()), bound) {
                                plan.carriers
                                    .push((bound.secret.clone(), name.clone(), value.clone()));
                            } else {
                                kept.append(name.clone(), value.clone());
                            }
                        }
                        self.headers = kept;
                    }
                    PlaceholderPlace::Query => {
                        let query = self.query.take().unwrap_or_default();
                        let holds = |part: &str| bound.placeholders.iter().any(|text| part.contains(text));
                        let taken = query.split('&').filter(|part| holds(part));
                        plan.parameters
                            .extend(taken.map(|part| (bound.secret.clone(), part.to_owned())));
                        self.query = query::without(&query, |_, part| part.is_empty() || holds(part));
                    }
                }
            }
        }
    }

    /// Writes the values. `values` holds one for each of [`Plan::secrets`]; what lacks its value is left out,
    /// placeholder and all.
    ///
    /// # Errors
    /// When a value does not fit into a header.
    pub fn write(
        &mut self,
        plan: &Plan,
        values: &BTreeMap<String, Arc<Sensitive>>,
    ) -> Result<(), InvalidHeaderValue> {
        for (secret, name, carrier) in &plan.carriers {
            let Some(value) = exposed(values, secret) else {
                continue;
            };
            let text = String::from_utf8_lossy(carrier.as_bytes()).into_owned();
            let replaced = match basic(&text) {
                Some(inside) => format!("Basic {}", STANDARD.encode(plan.replace(&inside, secret, value))),
                None => plan.replace(&text, secret, value),
            };
            self.headers.append(name.clone(), sensitive(&replaced)?);
        }
        for (secret, part) in &plan.parameters {
            let Some(value) = exposed(values, secret) else {
                continue;
            };
            let part = plan.replace(part, secret, &query::encoded(value));
            self.query = Some(match self.query.take() {
                Some(query) => format!("{query}&{part}"),
                None => part,
            });
        }
        for (secret, inject) in &plan.writes {
            let Some(value) = exposed(values, secret) else {
                continue;
            };
            match inject {
                Inject::Bearer => {
                    let header = sensitive(&format!("Bearer {value}"))?;
                    self.headers.insert(AUTHORIZATION, header);
                }
                Inject::Basic { username } => {
                    let pair = STANDARD.encode(format!("{username}:{value}"));
                    self.headers
                        .insert(AUTHORIZATION, sensitive(&format!("Basic {pair}"))?);
                }
                Inject::Header { header, format } => {
                    if let Ok(name) = HeaderName::from_bytes(header.as_bytes()) {
                        self.headers
                            .insert(name, sensitive(&format.replace(VALUE_MARK, value))?);
                    }
                }
                Inject::Query { parameter } => {
                    self.query = Some(query::with(self.query.take(), parameter, value));
                }
                Inject::Placeholder { .. } => {}
            }
        }
        Ok(())
    }
}

impl Plan {
    /// The secrets whose values are needed.
    pub fn secrets(&self) -> BTreeSet<&str> {
        let writes = self.writes.iter().map(|(secret, _)| secret.as_str());
        let carriers = self.carriers.iter().map(|(secret, _, _)| secret.as_str());
        let parameters = self.parameters.iter().map(|(secret, _)| secret.as_str());
        writes.chain(carriers).chain(parameters).collect()
    }

    fn replace(&self, text: &str, secret: &str, value: &str) -> String {
        let of_secret = self.placeholders.iter().filter(|(owner, _)| owner == secret);
        of_secret.fold(text.to_owned(), |text, (_, placeholder)| {
            text.replace(placeholder, value)
        })
    }
}

enum Target {
    Header(HeaderName),
    Query(String),
}

fn target(inject: &Inject) -> Option<Target> {
    match inject {
        Inject::Bearer | Inject::Basic { .. } => Some(Target::Header(AUTHORIZATION)),
        Inject::Header { header, .. } => HeaderName::from_bytes(header.as_bytes()).ok().map(Target::Header),
        Inject::Query { parameter } => Some(Target::Query(parameter.clone())),
        Inject::Placeholder { .. } => None,
    }
}

fn exposed<'a>(values: &'a BTreeMap<String, Arc<Sensitive>>, secret: &str) -> Option<&'a str> {
    values.get(secret).map(|value| value.expose())
}

fn narrow<T>(list: &mut Vec<T>, wanted: impl Fn(&T) -> bool) {
    if list.iter().any(&wanted) {
        list.retain(wanted);
    }
}

fn sensitive(text: &str) -> Result<HeaderValue, InvalidHeaderValue> {
    let mut value = HeaderValue::from_str(text)?;
    // Keeps it out of HPACK's table and out of debug output.
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use sandgate_api::credential::Binding;

    use super::*;

    const PLACEHOLDER: &str = "sk-sgp00123456789abcdef0123456789abcdef";

    const OTHER: &str = "other-sgp0fedcba9876543210fedcba9876543210";

    fn bindings(inject: Vec<Inject>) -> Bindings {
        let binding = |secret: &str, host: &str, placeholder: &str, inject| Binding {
            secret: secret.to_owned(),
            version: 1,
            hosts: vec![host.to_owned()],
            ports: vec![443],
            methods: Vec::new(),
            paths: Vec::new(),
            inject,
            strip_client_auth: true,
            placeholders: vec![placeholder.to_owned()],
        };
        let other = binding("OTHER", "other.test", OTHER, vec![Inject::Bearer]);
        Bindings::compile(&[binding("KEY", "api.test", PLACEHOLDER, inject), other]).expect("bindings")
    }

    fn request(query: Option<&str>, headers: &[(&str, &str)]) -> Outgoing {
        let mut outgoing = Outgoing {
            path: "/v1".to_owned(),
            query: query.map(str::to_owned),
            headers: HeaderMap::new(),
        };
        for (name, value) in headers {
            let name = HeaderName::from_bytes(name.as_bytes()).expect("a name");
            outgoing
                .headers
                .append(name, HeaderValue::from_str(value).expect("a value"));
        }
        outgoing
    }

    /// The request as it goes out; with the value, or without it.
    fn sent(inject: Vec<Inject>, mut request: Outgoing, value: Option<&str>) -> Result<Outgoing, Misuse> {
        let bindings = bindings(inject);
        let own: Vec<&Bound> = bindings.all().filter(|bound| bound.secret == "KEY").collect();
        let plan = request.plan(&bindings, &own, &[])?;
        let values = value.map(|value| ("KEY".to_owned(), Arc::new(Sensitive::new(value.to_owned()))));
        request.write(&plan, &values.into_iter().collect()).expect("fits");
        Ok(request)
    }

    fn all(outgoing: &Outgoing, name: &str) -> Vec<String> {
        let text = |value: &HeaderValue| value.to_str().expect("text").to_owned();
        outgoing.headers.get_all(name).iter().map(text).collect()
    }

    #[test]
    fn the_injected_header_is_the_only_credential() {
        let auth = format!("Bearer {PLACEHOLDER}");
        let client = request(
            Some("api_key=mine&q=1"),
            &[
                ("authorization", &auth),
                ("authorization", "Bearer attacker"),
                ("cookie", "session=attacker"),
                ("x-api-key", "attacker"),
                ("accept", "*/*"),
            ],
        );
        let out = sent(vec![Inject::Bearer], client, Some("real")).expect("no misuse");
        assert_eq!(all(&out, "authorization"), ["Bearer real"]);
        assert_eq!(out.headers.len(), 2, "{:?}", out.headers);
        assert_eq!(out.query.as_deref(), Some("q=1"));
    }

    #[test]
    fn the_clients_scheme_chooses_between_two_that_write_one_header() {
        let both = vec![
            Inject::Bearer,
            Inject::Basic {
                username: "x".to_owned(),
            },
        ];
        let basic = format!("Basic {}", STANDARD.encode(format!("me:{PLACEHOLDER}")));
        let out = sent(
            both.clone(),
            request(None, &[("authorization", &basic)]),
            Some("real"),
        );
        let wanted = format!("Basic {}", STANDARD.encode("x:real"));
        assert_eq!(
            all(&out.expect("no misuse"), "authorization")[..],
            *std::slice::from_ref(&wanted)
        );
        let out = sent(both.clone(), request(None, &[]), Some("real")).expect("no misuse");
        assert_eq!(all(&out, "authorization"), ["Bearer real"]);
        let mut git = request(None, &[]);
        git.path = "/o/r.git/info/refs".to_owned();
        assert_eq!(
            all(
                &sent(both, git, Some("real")).expect("no misuse"),
                "authorization"
            ),
            [wanted]
        );
    }

    #[test]
    fn a_placeholder_is_replaced_where_the_binding_says_and_refused_elsewhere() {
        let anywhere = vec![Inject::Placeholder {
            places: vec![PlaceholderPlace::Header, PlaceholderPlace::Query],
        }];
        let basic = format!("Basic {}", STANDARD.encode(format!("me:{PLACEHOLDER}")));
        let query = format!("a=1&token={PLACEHOLDER}");
        let client = || {
            request(
                Some(&query),
                &[("authorization", &basic), ("x-api-key", "attacker")],
            )
        };
        let out = sent(anywhere.clone(), client(), Some("re/al")).expect("no misuse");
        let wanted = format!("Basic {}", STANDARD.encode("me:re/al"));
        assert_eq!(all(&out, "authorization"), [wanted]);
        assert_eq!(out.query.as_deref(), Some("a=1&token=re%2Fal"));
        assert!(all(&out, "x-api-key").is_empty());

        let out = sent(anywhere, client(), None).expect("no misuse");
        assert!(out.headers.is_empty(), "{:?}", out.headers);
        assert_eq!(out.query.as_deref(), Some("a=1"));

        for misused in [
            request(Some(&format!("q={PLACEHOLDER}")), &[]),
            request(None, &[("x-debug", PLACEHOLDER)]),
            request(
                None,
                &[("x-debug", &format!("Basic {}", STANDARD.encode(PLACEHOLDER)))],
            ),
            request(None, &[("authorization", &format!("Bearer {OTHER}"))]),
            // Of a secret that nobody knows any more.
            request(
                None,
                &[("authorization", "Bearer sgp0aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")],
            ),
        ] {
            assert!(sent(vec![Inject::Bearer], misused, Some("real")).is_err());
        }
    }

    #[test]
    fn a_query_parameter_is_written_once() {
        let kind = vec![Inject::Query {
            parameter: "key".to_owned(),
        }];
        let client = request(Some(&format!("k%65y={PLACEHOLDER}&a=1&key=mine")), &[]);
        let out = sent(kind, client, Some("re al")).expect("no misuse");
        assert_eq!(out.query.as_deref(), Some("a=1&key=re%20al"));
    }
}
