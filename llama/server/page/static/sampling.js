// The settings of a conversation as fields of a request. Settings are the texts as they were
// typed, so that one that is wrong stays to be mended.

const number = (least, most) => (text) => {
  const value = Number(text.replace(",", "."));
  if (value >= least && value <= most) return value;
  throw new Error(`expected a number from ${least} to ${most}`);
};

const whole = (least) => (text) => {
  const value = Number(text);
  if (/^-?\d+$/.test(text) && Number.isSafeInteger(value) && value >= least) return value;
  throw new Error(`expected a whole number${least > -Infinity ? `, ${least} or more` : ""}`);
};

const lines = (text) => text.split("\n").filter((line) => line !== "");

function stops(text) {
  const found = lines(text).map((line) => line.replaceAll("\\n", "\n"));
  if (found.length <= 16 && found.every((each) => each.length <= 1000)) return found;
  throw new Error("expected up to 16 lines of up to 1,000 characters each");
}

/** Return what a text of JSON says; raise an Error for people if it is none. */
export function parseJson(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`this is no JSON: ${error.message}`);
  }
}

function named(text) {
  const schema = parseJson(text);
  if (schema instanceof Object && !Array.isArray(schema)) return { name: "answer", schema };
  throw new Error('expected a JSON object, such as {"type": "object"}');
}

/** Kinds of response schemas: their names, and what a request has of them. */
export const FORMS = {
  json_schema: ["JSON Schema", (text) => ({ json_schema: named(text) })],
  regex: ["Regular expression", (regex) => ({ regex })],
  choice: ["One of these lines", (text) => ({ choice: lines(text) })],
  grammar: ["Grammar (Lark or GBNF)", (grammar) => ({ grammar })],
};

function form(text, settings) {
  const type = Object.hasOwn(FORMS, settings.form ?? "") ? settings.form : "json_schema";
  return { type, ...FORMS[type][1](text) };
}

/** The fields that are typed: name in a request, label, how its text is read, hint. */
export const FIELDS = [
  ["temperature", "Temperature", number(0, 100), "0 takes the most probable token"],
  ["top_p", "Top-p", number(0, 1), "the probability to draw from; 1 for all tokens"],
  ["top_k", "Top-k", whole(-1), "how many tokens to draw from; 0 for all"],
  ["min_p", "Min-p", number(0, 1), "the least probability, as a share of the highest"],
  ["repetition_penalty", "Repetition penalty", number(0.001, 1000), "1 changes nothing"],
  ["presence_penalty", "Presence penalty", number(-2, 2), "for tokens that the answer has"],
  ["frequency_penalty", "Frequency penalty", number(-2, 2), "for each time that it has them"],
  ["seed", "Seed", whole(-Infinity), "the same one gives the same answer again"],
  ["max_tokens", "Longest answer", whole(1), "in tokens; empty for as long as fits"],
  ["min_tokens", "Shortest answer", whole(0), "in tokens"],
  ["stop", "Stop strings", stops, "that end an answer, one a line; \\n is a line's end"],
  ["response_format", "Response schema", form, "answers are held to it"],
];

/** Return a field's value, undefined if it is empty; raise an Error that says what is wrong. */
export function read([name, , parse], settings) {
  const text = String(settings[name] ?? "");
  return text.trim() === "" ? undefined : parse(text, settings);
}

/**
 * Return the fields of a request for chat that the settings ask for.
 *
 * @param settings a conversation's.
 * @param defaults the server's, which need not be sent.
 * @throws Error a field can't be read; its message says which, and what was expected.
 */
export function requestFields(settings, defaults = {}) {
  const found = {};
  for (const field of FIELDS) {
    const [name, label] = field;
    try {
      const value = read(field, settings);
      if (value !== undefined && value !== defaults[name]) found[name] = value;
    } catch (error) {
      throw new Error(`${label}: ${error.message}. Change it in the settings.`);
    }
  }
  if (settings.ignore_eos) found.ignore_eos = true;
  if (!settings.logprobs) return found;
  return { ...found, logprobs: true, top_logprobs: Number(settings.logprobs) || 0 };
}
