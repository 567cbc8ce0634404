// The server's API, as any client uses it.

const REMEDIES = {
  403: "The server doesn't answer under this address.",
  413: "That is more than the server takes in one request: send less.",
  503: "The server is shutting down: try again when it has been restarted.",
  504: "The server's time for one answer is over: ask for a shorter one.",
};
const GONE =
  "The server can't be reached. Nothing is lost: start the server again, or check the " +
  "connection, then try again.";
const BROKEN =
  "The connection broke before the answer's end. What was written is kept: continue it or retry.";

/** An answer other than the one asked for; its message says what to do. */
export class ApiError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    Object.assign(this, { status, code });
  }
}

function errorOf(status, body, headers) {
  const { message = "", code = null } = body?.error ?? {};
  const wait = headers?.get("Retry-After");
  const text = [REMEDIES[status] ?? "", message].filter(Boolean).join(" ");
  if (status === 429) {
    const when = wait ? `in ${wait} seconds` : "in a while";
    return new ApiError(`The server is busy: try again ${when}.`, status, code);
  }
  return new ApiError(text || `The server answered with status ${status}.`, status, code);
}

/** Yield the objects of a response's server-sent events. */
async function* events(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue; // comments keep the connection alive
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw errorOf(0, chunk);
        yield chunk;
      }
    }
  } catch (error) {
    if (signal?.aborted || error instanceof ApiError) throw error;
    throw new ApiError(BROKEN, 0, "connection_lost");
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new ApiError(BROKEN, 0, "connection_lost");
}

export class Api {
  /** `askKey(isWrong)` resolves to a key, or to null if there is none. */
  constructor(askKey = async () => null) {
    this.askKey = askKey;
    this.asking = null;
  }

  async request(path, body, signal) {
    const key = sessionStorage.getItem("llama-key");
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    if (body) headers["Content-Type"] = "application/json";
    const method = body ? "POST" : "GET";
    const options = { method, headers, body: body && JSON.stringify(body), signal };
    let response;
    try {
      // Otherwise the browser would ask for the key too, in a window of its own.
      response = await fetch(new URL(path, document.baseURI), { credentials: "omit", ...options });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ApiError(GONE, 0, "unreachable");
    }
    if (response.ok) return response;
    const found = await response.json().catch(() => null);
    const error = errorOf(response.status, found, response.headers);
    if (response.status === 401 && (await this.hasNewKey(key))) {
      return this.request(path, body, signal);
    }
    throw error;
  }

  // Requests that are refused at the same time ask for the key once.
  async hasNewKey(refused) {
    if (sessionStorage.getItem("llama-key") !== refused) return true;
    this.asking ??= this.askKey(refused !== null);
    const key = await this.asking;
    this.asking = null;
    if (key) sessionStorage.setItem("llama-key", key);
    return Boolean(key);
  }

  async models() {
    return (await (await this.request("v1/models")).json()).data;
  }

  async *chat(body, signal) {
    yield* events(await this.stream("v1/chat/completions", body, signal), signal);
  }

  async *complete(body, signal) {
    yield* events(await this.stream("v1/completions", body, signal), signal);
  }

  stream(path, body, signal) {
    const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
    return this.request(path, streamed, signal);
  }

  /** Return the number of tokens of a dialog (messages, tools) or of a prompt. */
  async count(body, signal) {
    return (await (await this.request("tokenize", body, signal)).json()).count;
  }

  /** Return the safe HTML of a Markdown text. */
  async render(text) {
    return (await (await this.request("render", { text, kind: "markdown" })).json()).html;
  }
}
