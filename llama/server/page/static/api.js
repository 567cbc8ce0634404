// The server's API, as any client uses it.

const REMEDIES = {
  403: "The server doesn't answer under this address:",
  413: "Send less:",
  503: "Try again when the server has been restarted:",
  504: "Ask for a shorter answer:",
};
const GONE =
  "The server can't be reached. Nothing is lost: start the server again, or check the " +
  "connection, then try again.";
const LOST =
  "The connection broke before the answer's end. What was written is kept: continue it or retry.";

/** An answer other than the one asked for; its message says what to do. */
export class ApiError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    Object.assign(this, { status, code });
  }
}

function errorOf(status, body, wait = null) {
  const { message = `The server answered with status ${status}.`, code } = body?.error ?? {};
  const when = wait ? `in ${wait} seconds` : "in a while";
  const says = {
    401: "The server wants its key: try again, and give it.",
    429: `The server is busy: try again ${when}.`,
  };
  const text = says[status] ?? `${REMEDIES[status] ?? ""} ${message}`.trim();
  return new ApiError(text, status, code);
}

/** Yield the objects of a response's server-sent events. */
async function* events(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let rest = "", part = await reader.read(); !part.done; part = await reader.read()) {
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      for (const line of lines.filter((each) => each.startsWith("data:"))) {
        if (line.slice(5).trim() === "[DONE]") return;
        const event = JSON.parse(line.slice(5));
        if (event.error) throw errorOf(0, event);
        yield event;
      }
    }
  } catch (error) {
    if (signal?.aborted || error instanceof ApiError) throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new ApiError(LOST, 0, "connection_lost");
}

/** Return where the key is kept until the tab is closed, null where the browser forbids it. */
function session() {
  try {
    return sessionStorage;
  } catch {
    return null;
  }
}

export class Api {
  /** `askKey(isWrong)` resolves to the key that a person gives, null if there is none. */
  constructor(askKey = async () => null) {
    this.askKey = askKey;
    this.key = session()?.getItem("llama-key") ?? null;
  }

  async request(path, body, signal) {
    const { key } = this;
    const headers = body ? { "Content-Type": "application/json" } : {};
    if (key) headers.Authorization = `Bearer ${key}`;
    const sent = { method: body ? "POST" : "GET", body: body && JSON.stringify(body) };
    // Without "omit" the browser asks for the key too, in a window of its own.
    const options = { credentials: "omit", headers, signal };
    let response;
    try {
      response = await fetch(new URL(path, document.baseURI), { ...options, ...sent });
    } catch (error) {
      throw signal?.aborted ? error : new ApiError(GONE, 0, "unreachable");
    }
    if (response.ok) return response;
    if (response.status === 401 && (await this.hasNewKey(key))) {
      return this.request(path, body, signal);
    }
    const found = await response.json().catch(() => null);
    throw errorOf(response.status, found, response.headers.get("Retry-After"));
  }

  async hasNewKey(refused) {
    if (this.key !== refused) return true;
    this.asking ??= this.askKey(refused !== null); // once for all requests that were refused
    const key = await this.asking;
    this.asking = null;
    if (!key) return false;
    this.key = key;
    session()?.setItem("llama-key", key);
    return true;
  }

  async *stream(path, body, signal) {
    const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
    yield* events(await this.request(path, streamed, signal), signal);
  }

  chat = (body, signal) => this.stream("v1/chat/completions", body, signal);

  complete = (body, signal) => this.stream("v1/completions", body, signal);

  json = async (path, body, signal) => (await this.request(path, body, signal)).json();

  models = async () => (await this.json("v1/models")).data;

  /** Return the number of tokens of a dialog (messages, tools) or of a prompt. */
  count = async (body, signal) => (await this.json("tokenize", body, signal)).count;

  /** Return the safe HTML of a Markdown text. */
  render = async (text) => (await this.json("render", { text, kind: "markdown" })).html;
}
