// Where a block of Markdown ends in a text that is still being written.

const LIST = /^ {0,3}(?:[-*+]|\d+[.)])\s/;

const CONTINUED = /^( {2}|\t)/;
const FENCE = /^\s*(`{3,}|~{3,})/;

const opensFormula = (line) =>
  line.split("$$").length % 2 === 0 || line.lastIndexOf("\\[") > line.lastIndexOf("\\]");

/**
 * Return where the first block of a text ends, -1 if what follows may still belong to it: a fence
 * or a formula is open, a list may go on.
 */
export function blockEnd(text) {
  const isList = LIST.test(text.trimStart());
  const lines = text.split("\n");
  let [at, fence, isFormula, hasText, wasBlank] = [0, "", false, false, false];
  for (const [i, line] of lines.entries()) {
    const isWhole = i < lines.length - 1;
    const ticks = FENCE.exec(line)?.[1] ?? "";
    if (fence) {
      if (isWhole && ticks.startsWith(fence) && line.trim() === ticks) fence = "";
      if (!fence && !isList) return at + line.length + 1;
    } else if (isFormula) {
      isFormula = !line.includes("$$") && !line.includes("\\]");
    } else if (!line.trim()) {
      wasBlank = hasText;
    } else {
      const goesOn = CONTINUED.test(line) || (isList && (!isWhole || LIST.test(line)));
      if (wasBlank && !goesOn) return at;
      [hasText, wasBlank, fence] = [true, false, ticks];
      isFormula = !ticks && opensFormula(line);
    }
    at += line.length + 1;
  }
  return -1;
}
