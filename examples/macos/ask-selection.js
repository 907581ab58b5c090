#!/usr/bin/osascript -l JavaScript
// Asks about the text that is selected in the front application. It copies the selection, so the clipboard changes, and
// it needs the permission "Accessibility". For a key binding; in Script Editor it can be saved as an application.

const scripts = "~/Library/Scripts/nectar"; // where the files of this folder are

function quoted(text) {
    return "'" + text.replace(/'/g, "'\\''") + "'";
}

function command(question, selection) {
    const text = selection ? question + "\n\n" + selection : question;
    return "printf %s " + quoted(text) + " | " + scripts + "/ask.sh";
}

function selectedText(app) {
    const before = app.theClipboard();
    Application("System Events").keystroke("c", { using: "command down" });
    delay(0.3);
    const copied = app.theClipboard();
    return typeof copied === "string" && copied !== before ? copied : "";
}

function run() {
    const app = Application.currentApplication();
    app.includeStandardAdditions = true;
    const selection = selectedText(app);
    let question;
    try {
        question = app.displayDialog(selection ? "Ask about the selection" : "Ask", { defaultAnswer: "" }).textReturned;
    } catch (cancelled) {
        return;
    }
    let answer;
    try {
        answer = app.doShellScript(command(question, selection));
    } catch (error) {
        answer = "No answer: " + error.message;
    }
    app.displayDialog(answer, { buttons: ["OK"], defaultButton: "OK" });
}
